"""Generation on a terminal: prompts from files, continuations as they come, conversations."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from openmoe.checkpoint.paths import read_small
from openmoe.config import ConfigError
from openmoe.inference import chat
from openmoe.inference.decode import Sampling
from openmoe.inference.model import LanguageModel
from openmoe.observe.text import visible

_LIMIT = 1 << 30  # bytes of a file of prompts


def decode(content: bytes, where: str) -> str:
  """UTF-8 text without a byte order mark.

  Args:
    where: what an error calls it.

  Raises:
    ConfigError: it is not UTF-8; with line and byte.
  """
  try:
    return content.decode('utf-8').removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise ConfigError(
      f'{where} line {line} is not UTF-8 (byte 0x{content[error.start]:02x} at {error.start}): '
      'save it as UTF-8.'
    ) from error


def read_prompts(path: str | os.PathLike) -> list[str]:
  """Prompts of a file, one a line; empty lines are left out. Only a line feed ends a line.

  Raises:
    ConfigError: the file is missing, not UTF-8, or holds nothing.
  """
  path = os.fspath(path)
  if not os.path.exists(path):
    raise ConfigError(f'--prompts_file={path} does not exist; give a text file, a prompt a line.')
  text = decode(read_small(path, _LIMIT), path)
  return [line for line in (line.removesuffix('\r') for line in text.split('\n')) if line]


@dataclasses.dataclass(frozen=True)
class Asking:
  """How a model is asked.

  Attributes:
    max_new_tokens: at most so many.
    stop: texts that end a continuation.
    sampling: how tokens are drawn.
    samples: continuations of each prompt.
    seed: of draws.
    chat: prompts are what a user says.
    system: system message; None for OpenMoE's own where its template is used.
  """

  max_new_tokens: int = 64
  stop: tuple[str, ...] = ()
  sampling: Sampling = Sampling()
  samples: int = 1
  seed: int = 0
  chat: bool = False
  system: str | None = None

  def options(self, model: LanguageModel) -> dict[str, Any]:
    """Arguments of model.generate()."""
    stop = [*self.stop, *(model.chat_template.stop if self.chat else ())]
    return {'stop': stop, 'sampling': self.sampling, 'seed': self.seed}

  def opening(self, model: LanguageModel) -> list[dict[str, str]]:
    """What a conversation begins with."""
    system = self.system
    if system is None and model.chat_template is chat.OPENMOE:
      system = chat.OPENMOE_SYSTEM
    return [{'role': 'system', 'content': system}] if system else []

  def encode(self, model: LanguageModel, prompt: str) -> list[int]:
    """Token ids of a prompt."""
    if not self.chat:
      return list(model.vocabulary.encode(prompt))
    return model.encode_chat([*self.opening(model), {'role': 'user', 'content': prompt}])


def show(piece: str) -> None:
  """Prints a piece of a text, so that nothing in it moves the cursor or colours the screen."""
  print(visible(piece), end='', flush=True)


def stream(model: LanguageModel, prompt: str, asking: Asking) -> None:
  """Prints the single continuation of a prompt as it comes, behind the prompt."""
  if not asking.chat:
    show(prompt)
  ids = [asking.encode(model, prompt)]
  model.generate(ids, asking.max_new_tokens, **asking.options(model), samples=1, show=show)
  print()


def lines(
  model: LanguageModel, prompts: Sequence[str], asking: Asking, as_json: bool
) -> Iterator[str]:
  """Lines to print about the continuations of every prompt."""
  ids = [asking.encode(model, prompt) for prompt in prompts]
  options = asking.options(model) | {'samples': asking.samples}
  for prompt, found in zip(
    prompts, model.generate(ids, asking.max_new_tokens, **options), strict=True
  ):
    if as_json:
      yield json.dumps({'prompt': prompt, 'continuations': [dataclasses.asdict(g) for g in found]})
      continue
    for number, generation in enumerate(found, 1):
      yield visible(f'--- {prompt!r}, {number} of {len(found)}, ended by {generation.finish}')
      yield visible(generation.text)


def talk(model: LanguageModel, asking: Asking) -> None:
  """A conversation on the terminal; the oldest turns go when it gets too long."""
  print(visible(f'{model.name}. An empty line ends the conversation.'), file=sys.stderr)
  first, turns = asking.opening(model), []
  while said := _line():
    turns.append({'role': 'user', 'content': said})
    ids = _fitting(model, first, turns, asking.max_new_tokens)
    if ids is None:
      turns.pop()
      continue
    options = asking.options(model)
    (answer,) = model.generate([ids], asking.max_new_tokens, **options, show=show)[0]
    print()
    turns.append({'role': 'assistant', 'content': answer.text.strip()})


def _line() -> str:
  try:
    return input('> ')
  except EOFError:
    return ''
  except UnicodeDecodeError as error:
    raise ConfigError(f'The line is not UTF-8 ({error}); set the terminal to UTF-8.') from error


def _fitting(model: LanguageModel, first, turns: list, new_tokens: int) -> list[int] | None:
  """Token ids of the conversation without its oldest turns where it is too long; drops these.

  None, and a word to the user, where the last turn alone is too long.
  """
  while len(ids := model.encode_chat([*first, *turns])) + 1 + new_tokens > model.max_length:
    if len(turns) < 3:
      print(
        f'{len(ids)} tokens of this turn and --max_new_tokens={new_tokens} are more than '
        f'--max_length={model.max_length}; say less, or change these.',
        file=sys.stderr,
      )
      return None
    del turns[:2]
  return ids
