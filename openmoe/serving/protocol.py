"""The forms of OpenAI's HTTP interface: what clients send, checked, and what they get.

Of /v1/completions: prompt (text, token ids, or a list of either), max_tokens, n, stop, seed,
temperature, top_p, top_k, logprobs, echo, stream, stream_options. Of /v1/chat/completions:
messages, max_tokens or max_completion_tokens, n, stop, seed, temperature, top_p, top_k, logprobs,
top_logprobs, stream, stream_options. Of both, beyond OpenAI's: experts, which tells for each new
token what every router chose (their order is that of /health). Fields that would change an answer
and are not known here are refused by name; those that only describe a request (user, metadata,
store, model) are taken.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.inference.decode import Sampling
from openmoe.inference.model import LanguageModel, row_keys
from openmoe.serving.request import Ask, Event, Token
from openmoe.serving.slots import ALTERNATIVES

_MOST_SAMPLES = 16
_MOST_PROMPTS = 64
_MOST_STOPS = 16
_FINISH = {'eos': 'stop', 'stop': 'stop', 'length': 'length', 'time': 'length'}
_SILENT = {'model', 'user', 'metadata', 'store', 'service_tier', 'parallel_tool_calls'}
# What has no effect at these values, and is not there at others.
_NEUTRAL = {
  'presence_penalty': (0, None),
  'frequency_penalty': (0, None),
  'logit_bias': (None, {}),
  'best_of': (None, 1),
  'suffix': (None, ''),
  'response_format': (None, {'type': 'text'}),
  'tools': (None, []),
  'tool_choice': (None, 'none'),
}
_NAMES = {
  int: 'a whole number',
  float: 'a number',
  bool: 'true or false',
  dict: 'an object',
  list: 'a list',
}
_COMMON = {
  *('n', 'stop', 'seed', 'temperature', 'top_p', 'top_k', 'logprobs', 'stream', 'stream_options'),
  *('max_tokens', 'experts'),
}
_FIELDS = {
  False: _COMMON | {'prompt', 'echo'},
  True: _COMMON | {'messages', 'max_completion_tokens', 'top_logprobs'},
}


@dataclasses.dataclass(frozen=True)
class Request:
  """A request that was understood.

  Attributes:
    chat: whether it is a conversation.
    prompts: token ids of each prompt.
    asks: one a choice: those of the first prompt, then of the next.
    echo: the text of each prompt, where it is to come back; None without.
    logprobs: whether probabilities are told.
    experts: whether the experts of each new token are told.
    stream, usage: whether pieces are sent as they come, and the counts at the end of them.
  """

  chat: bool
  prompts: list[list[int]]
  asks: list[Ask]
  echo: list[str] | None
  logprobs: bool
  experts: bool
  stream: bool
  usage: bool


def _field(body: Mapping[str, Any], name: str, kinds, default: Any, least=None, most=None) -> Any:
  """A value of one of some types inside its bounds.

  Raises:
    ConfigError: it is another one.
  """
  value = body.get(name)
  if value is None:
    return default
  kinds = kinds if isinstance(kinds, tuple) else (kinds,)
  fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
  # NaN is in no range.
  if not fits or not (least is None or value >= least) or not (most is None or value <= most):
    names = ' or '.join(_NAMES[kind] for kind in kinds)
    bounds = '' if least is None else f' from {least}' + ('' if most is None else f' to {most}')
    raise ConfigError(f'{name}={value!r:.80} must be {names}{bounds}.')
  return value


def read(body: Mapping[str, Any], model: LanguageModel, chat: bool, timeout: float) -> Request:
  """A request from the JSON that a client sent.

  Args:
    model: that will answer.
    timeout: seconds that an answer may take.

  Raises:
    ConfigError: a field is missing, unknown or of another kind; with name, value and rule.
  """
  _refuse_unknown(body, chat)
  prompts = [_conversation(body, model)] if chat else _prompts(body, model)
  choices = _field(body, 'n', int, 1, 1, _MOST_SAMPLES)
  alternatives, logprobs = _alternatives(body, chat)
  echo = not chat and _field(body, 'echo', bool, False)
  sampling = Sampling(
    float(_field(body, 'temperature', (int, float), 1.0, 0, 100)),
    _field(body, 'top_k', int, 0, 0, 1 << 20),
    float(_field(body, 'top_p', (int, float), 1.0, 1e-6, 1)),
  )
  seed = _field(body, 'seed', int, None, -(1 << 63), (1 << 63) - 1)
  seeds = row_keys(prompts, choices, time.time_ns() if seed is None else seed)
  stop = (*_stops(body), *(model.chat_template.stop if chat else ()))
  deadline = time.monotonic() + timeout
  asks = []
  for prompt, of_prompt in zip(prompts, seeds, strict=True):
    new = _new_tokens(body, chat, model, len(prompt), echo)
    rest = (alternatives, echo and logprobs, deadline)
    asks += [Ask(tuple(prompt), new, stop, sampling, int(own), *rest) for own in of_prompt]
  options = _field(body, 'stream_options', dict, {})
  texts = [model.vocabulary.decode(prompt) for prompt in prompts] if echo else None
  stream = _field(body, 'stream', bool, False)
  experts = _field(body, 'experts', bool, False)
  if experts and model.config.moe is None:
    raise ConfigError(f'experts=true: {model.name} has none.')
  told = (logprobs, experts, stream, options.get('include_usage') is True)
  return Request(chat, prompts, asks, texts, *told)


def _refuse_unknown(body: Mapping[str, Any], chat: bool) -> None:
  for name, value in body.items():
    if name in _FIELDS[chat] or name in _SILENT:
      continue
    if name not in _NEUTRAL:
      known = ', '.join(sorted(_FIELDS[chat]))
      raise ConfigError(f'{name:.40} is not known here; known are {known}.')
    if value not in _NEUTRAL[name]:
      raise ConfigError(f'{name}={value!r:.80} is not implemented; leave it out.')


def _conversation(body: Mapping[str, Any], model: LanguageModel) -> list[int]:
  messages = _field(body, 'messages', list, None)
  if not messages:
    raise ConfigError('messages is missing: a list of {"role": ..., "content": ...}.')
  plain = []
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or not isinstance(message.get('role'), str):
      raise ConfigError(f'messages[{i}] must be {{"role": ..., "content": ...}}.')
    content = message.get('content')
    if isinstance(content, list):  # parts of a message: only texts are understood
      parts = [part.get('text') if isinstance(part, dict) else None for part in content]
      content = ''.join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
      raise ConfigError(f'messages[{i}].content must be a text.')
    plain.append({'role': message['role'], 'content': content})
  return model.encode_chat(plain)


def _prompts(body: Mapping[str, Any], model: LanguageModel) -> list[list[int]]:
  given = body.get('prompt')
  is_ids = lambda x: isinstance(x, list) and all(type(i) is int for i in x)
  several = given if isinstance(given, list) and not (given and is_ids(given)) else [given]
  if not several or len(several) > _MOST_PROMPTS:
    raise ConfigError(f'prompt has {len(several)} entries; 1 to {_MOST_PROMPTS} are taken.')
  found = []
  for one in several:
    if isinstance(one, str):
      found.append([int(i) for i in model.vocabulary.encode(one)])
    elif is_ids(one):
      # Clients that tokenise themselves send the token that begins a sequence, which is added here.
      found.append(one[1:] if one and one[0] == model.start_id else one)
    else:
      raise ConfigError(f'prompt={one!r:.80} must be a text, token ids, or a list of these.')
  return found


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
  given = body.get('stop')
  several = [] if given is None else [given] if isinstance(given, str) else given
  fits = isinstance(several, list) and all(isinstance(s, str) and s for s in several)
  if not fits or len(several) > _MOST_STOPS:
    raise ConfigError(f'stop={given!r:.80} must be a text or up to {_MOST_STOPS} of them.')
  return tuple(several)


def _alternatives(body: Mapping[str, Any], chat: bool) -> tuple[int, bool]:
  """(how many likeliest tokens are told, whether probabilities are)."""
  if chat:
    wanted = _field(body, 'logprobs', bool, False)
    most = _field(body, 'top_logprobs', int, 0, 0, ALTERNATIVES)
    if most and not wanted:
      raise ConfigError(f'top_logprobs={most} wants logprobs=true.')
    return most, wanted
  count = _field(body, 'logprobs', int, None, 0, ALTERNATIVES)
  return count or 0, count is not None


def _new_tokens(body, chat: bool, model: LanguageModel, length: int, echo: bool) -> int:
  names = ('max_completion_tokens', 'max_tokens') if chat else ('max_tokens',)
  given = next((body[name] for name in names if body.get(name) is not None), None)
  room = max(model.max_length - 1 - length, 1)
  if given is None:
    return room if chat else min(16, room)
  least = 0 if echo else 1
  if type(given) is not int or given < least:
    raise ConfigError(f'max_tokens={given!r:.80} must be a whole number from {least}.')
  return min(given, room) if given else 0


# --- answers


def usage(request: Request, answers: Sequence[Sequence[int]]) -> dict[str, int]:
  """Counts of tokens.

  Args:
    answers: tokens of every choice.
  """
  prompt = sum(len(prompt) for prompt in request.prompts)
  new = sum(map(len, answers))
  return {'prompt_tokens': prompt, 'completion_tokens': new, 'total_tokens': prompt + new}


def head(request: Request, name: str, number: str, created: int, streams: bool) -> dict[str, Any]:
  """What every answer begins with."""
  kind = 'chat.completion' if request.chat else 'text_completion'
  kind += '.chunk' if streams and request.chat else ''
  prefix = 'chatcmpl' if request.chat else 'cmpl'
  return {'id': f'{prefix}-{number}', 'object': kind, 'created': created, 'model': name}


def choice(
  request: Request, index: int, event: Event, model: LanguageModel, *, streams: bool, first: bool
) -> dict[str, Any]:
  """One entry of `choices`.

  Args:
    event: a piece of the answer, or all of it.
    streams: whether it is a piece.
    first: whether it is the first one.
  """
  found: dict[str, Any] = {'index': index, 'finish_reason': _FINISH.get(event.finish or '')}
  text = event.text
  echoed = request.echo is not None and first
  if echoed:
    text = request.echo[index * len(request.prompts) // len(request.asks)] + text
  if request.chat:
    role = {'role': 'assistant'} if first or not streams else {}
    found['delta' if streams else 'message'] = role | {'content': text}
  else:
    found['text'] = text
  found['logprobs'] = None
  if request.logprobs:
    tokens = [*event.prompt, *event.tokens] if echoed else list(event.tokens)
    found['logprobs'] = (_chat_logprobs if request.chat else _logprobs)(tokens, model)
  if request.experts:
    found['experts'] = [token.experts for token in event.tokens]
  return found


def _piece(token: int, model: LanguageModel) -> str:
  return model.vocabulary.decode([token])


def _chat_logprobs(tokens: Sequence[Token], model: LanguageModel) -> dict[str, Any]:
  def one(token: int, log_prob: float) -> dict[str, Any]:
    text = _piece(token, model)
    return {'token': text, 'logprob': log_prob, 'bytes': list(text.encode('utf-8', 'replace'))}

  content = [
    one(t.id, t.log_prob) | {'top_logprobs': [one(*other) for other in t.others]} for t in tokens
  ]
  return {'content': content, 'refusal': None}


def _logprobs(tokens: Sequence[Token], model: LanguageModel) -> dict[str, Any]:
  texts = [_piece(t.id, model) for t in tokens]
  offsets, at = [], 0
  for text in texts:
    offsets.append(at)
    at += len(text)
  return {
    'tokens': texts,
    'token_logprobs': [t.log_prob for t in tokens],
    'top_logprobs': [{_piece(i, model): p for i, p in t.others} for t in tokens],
    'text_offset': offsets,
  }


def whole(events: Sequence[Event]) -> Event:
  """All pieces of an answer as one."""
  last = events[-1]
  return Event(
    ''.join(e.text for e in events),
    tuple(t for e in events for t in e.tokens),
    last.finish,
    last.error,
    tuple(t for e in events for t in e.prompt),
  )


def error(message: str, kind: str = 'invalid_request_error') -> dict[str, Any]:
  """The body of a refusal."""
  return {'error': {'message': message, 'type': kind, 'param': None, 'code': None}}
