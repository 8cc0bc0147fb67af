"""Chat templates: messages to the text that a chat model was tuned on.

OpenMoE's is Llama-2's with the system part in front of the first `<s>[INST]`; its tuning data held
`<s>` and `</s>` as plain text, so they are text here too, and its `</s>` is a stop string. JetMoE's
chat model comes with a template in its tokenizer's folder, which is used when it is there; without
one, the format of its tuning recipe is taken.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from openmoe.config import ConfigError

Messages = Sequence[Mapping[str, str]]
ROLES = ('system', 'user', 'assistant')


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """How messages become a prompt.

  Attributes:
    name: for people.
    render: (messages, whether an answer is to follow) -> text.
    stop: where an answer ends, besides EOS.
    eos_text: what stands for EOS in the text; None where there is no such thing.
  """

  name: str
  render: Callable[[Messages, bool], str]
  stop: tuple[str, ...] = ()
  eos_text: str | None = None

  def text(self, messages: Messages, answer_follows: bool = True) -> str:
    """The prompt.

    Raises:
      ConfigError: there is no message, or one has an unknown role.
    """
    wrong = [m.get('role') for m in messages if m.get('role') not in ROLES]
    if wrong or not messages:
      raise ConfigError(f'Roles {wrong or "of no messages"}: each must be one of {ROLES}.')
    return self.render(messages, answer_follows)

  def encode(self, text: str, encode: Callable[[str], Sequence[int]], eos_id: int) -> list[int]:
    """Token ids of a prompt, EOS where eos_text stands."""
    if self.eos_text is None:
      return list(encode(text))
    ids: list[int] = []
    for piece in re.split(f'({re.escape(self.eos_text)})', text):
      ids += [eos_id] if piece == self.eos_text else list(encode(piece)) if piece else []
    return ids


def _openmoe(messages: Messages, answer_follows: bool) -> str:
  del answer_follows  # a user's turn already ends with the sign to answer
  forms = {
    'system': '<<SYS>>\n{}\n<</SYS>>\n\n',
    'user': '<s>[INST] {} [/INST]',
    'assistant': ' {} </s>',
  }
  return ''.join(forms[m['role']].format(m['content']) for m in messages)


def _recipe(messages: Messages, answer_follows: bool) -> str:
  turns = ''.join(f'<|{m["role"]}|>\n{m["content"]}</s>\n' for m in messages)
  return turns + ('<|assistant|>\n' if answer_follows else '')


OPENMOE = ChatTemplate('openmoe', _openmoe, stop=('</s>',))
JETMOE = ChatTemplate('jetmoe', _recipe, eos_text='</s>')
OPENMOE_SYSTEM = 'You are a helpful, respectful and honest assistant.'


def from_folder(folder: pathlib.Path) -> ChatTemplate | None:
  """The template beside a tokenizer, if there is one.

  Raises:
    ConfigError: there is one, and jinja2, which it needs, is not installed.
  """
  config = folder / 'tokenizer_config.json'
  facts = json.loads(config.read_text(encoding='utf-8')) if config.is_file() else {}
  own = folder / 'chat_template.jinja'
  source = own.read_text(encoding='utf-8') if own.is_file() else facts.get('chat_template')
  if isinstance(source, list):  # several, by name
    source = next((t['template'] for t in source if t.get('name') == 'default'), None)
  if not source:
    return None
  try:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError as error:
    raise ConfigError(
      f'{folder} has a chat template, which needs jinja2: install the `eval` or `torch` extra.'
    ) from error
  text = lambda value: value.get('content', '') if isinstance(value, dict) else value or ''
  bos, eos = text(facts.get('bos_token')), text(facts.get('eos_token')) or '</s>'
  compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)

  def render(messages: Messages, answer_follows: bool) -> str:
    values = {'messages': messages, 'add_generation_prompt': answer_follows}
    out = compiled.render(**values, bos_token=bos, eos_token=eos)
    return out.removeprefix(bos)  # the model adds it

  return ChatTemplate(folder.name, render, eos_text=eos)
