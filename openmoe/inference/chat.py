"""Chat templates: messages to the text that a chat model was tuned on.

OpenMoE's is Llama-2's with the system part in front of the first `<s>[INST]`; its tuning data held
`<s>` and `</s>` as plain text, so they are text here too, and its `</s>` is a stop string. JetMoE's
chat model comes with a template in its tokenizer's folder, which is used when it is there; without
one, the format of its tuning recipe is taken.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.description import ChatRecord
from openmoe.checkpoint.fields import LONGEST_LINE
from openmoe.checkpoint.paths import Unreadable, read_small
from openmoe.config import ConfigError
from openmoe.inference.template import Renderer

Messages = Sequence[Mapping[str, str]]
_MOST_BYTES = 1 << 20  # of a template
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
    """Token ids of a prompt, EOS where eos_text stands and is no token of its own."""
    if self.eos_text is None or len(list(encode(self.eos_text))) == 1:
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


def record_of(folder: pathlib.Path) -> ChatRecord | None:
  """The template beside a tokenizer, if there is one; nothing is compiled.

  Raises:
    ConfigError: its file or tokenizer_config.json cannot be read, or it is longer than any.
  """
  facts = tokenizer_config(folder)
  own = folder / 'chat_template.jinja'
  source = _small_text(own) if own.is_file() else _chosen(facts.get('chat_template'))
  if not source:
    return None
  text = lambda value: value.get('content', '') if isinstance(value, dict) else value or ''
  name = ''.join(filter(str.isprintable, folder.name))[:LONGEST_LINE]
  return ChatRecord(name, source, text(facts.get('bos_token')), text(facts.get('eos_token')))


def of_record(record: ChatRecord) -> ChatTemplate:
  """The template that a checkpoint tells of; it is compiled when it is first used."""
  bos, eos = record.bos_text, record.eos_text or '</s>'
  renderer = Renderer(record.template_text, record.name)

  def render(messages: Messages, answer_follows: bool) -> str:
    values = {'messages': list(messages), 'add_generation_prompt': answer_follows}
    out = renderer.render(values | {'bos_token': bos, 'eos_token': eos})
    return out.removeprefix(bos)  # the model adds it

  return ChatTemplate(record.name, render, eos_text=eos)


def from_folder(folder: pathlib.Path) -> ChatTemplate | None:
  """The template beside a tokenizer, if there is one.

  Raises:
    ConfigError: as record_of().
  """
  record = record_of(folder)
  return of_record(record) if record else None


def tokenizer_config(folder: pathlib.Path) -> dict[str, Any]:
  """tokenizer_config.json, {} where there is none.

  Raises:
    ConfigError: it cannot be read, or a token in it is no text.
  """
  path = folder / 'tokenizer_config.json'
  if not path.is_file():
    return {}
  try:
    facts = safe_json.read(path)
  except (Unreadable, OSError) as error:
    raise ConfigError(f'{path} cannot be read: {error} Download it again, or remove it.') from error
  for name in ('bos_token', 'eos_token'):
    token = facts.get(name)
    token = token.get('content') if isinstance(token, dict) else token
    if not isinstance(token, str | None):
      raise ConfigError(f'{path}: {name}={facts[name]!r} is no text; repair it.')
  return facts


def _chosen(source: Any) -> str | None:
  """The template of tokenizer_config.json: a text, or the one named default of several."""
  if isinstance(source, list):
    named = (t for t in source if isinstance(t, dict) and t.get('name') == 'default')
    source = next((t.get('template') for t in named), None)
  return source if isinstance(source, str) else None


def _small_text(path: pathlib.Path) -> str:
  try:
    return read_small(path, _MOST_BYTES).decode('utf-8-sig')
  except (Unreadable, OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{path} cannot be read as a template: {error}') from error
