"""The lm-evaluation-harness's view of a LanguageModel.

The harness has no list of plug-ins to be found in: a model is known once it is registered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.evaluation.prompts import check_finite, split
from openmoe.inference.decode import Sampling
from openmoe.inference.model import LanguageModel

NAME = 'openmoe'
MAX_NEW_TOKENS = 256  # the harness's own default for tasks that do not say
# What tasks call the length of an answer, the first that is given counts.
_LENGTHS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
_LEAST_MASS = 1e-6  # stands for top_p=0


@dataclasses.dataclass(frozen=True)
class _Asked:
  """What a generation task asks for; requests that ask the same run together."""

  stop: tuple[str, ...]
  max_new_tokens: int
  sampling: Sampling


def _number(name: str, value: Any, least: float, whole: bool = True) -> float:
  """A checked option; numbers of the command line may come as text."""
  try:
    number = float(value) if isinstance(value, str) else value
  except ValueError:
    number = None
  good = isinstance(number, int | float) and not isinstance(number, bool)
  if not good or not least <= number < math.inf or (whole and number != int(number)):
    kind = 'a whole number' if whole else 'a number'
    raise ConfigError(f'{name}={value!r} must be {kind}, {least} or more.')
  return number


def _sampling(options: Mapping[str, Any]) -> Sampling:
  """How tokens are drawn: not at all where do_sample is off, or temperature or top_p is 0."""
  given = {name: value for name, value in options.items() if value is not None}
  draws = given.get('do_sample')
  if draws not in (None, True, False):
    raise ConfigError(f'do_sample={draws!r} must be True or False.')
  # Who only asks for draws means those of an even temperature.
  heat = _number('temperature', given.get('temperature', 1.0 if draws else 0.0), 0, whole=False)
  top_k = int(_number('top_k', given.get('top_k', 0), 0))
  top_p = _number('top_p', given.get('top_p', 1.0), 0, whole=False)
  if draws is False or heat == 0:
    return Sampling()
  if top_p == 0:  # as few tokens as there can be
    return Sampling(0.0, top_k, _LEAST_MASS)
  return Sampling(float(heat), top_k, float(top_p))


class Adapter:
  """The harness's requests, answered by a LanguageModel; see lm_eval.api.model.LM.

  Args:
    checkpoint: a run, a checkpoint or a folder; open_model takes it and the other options.
    model: a model that is open already, in place of checkpoint.
    batch_size: rows of a batch at most.
    device, max_batch_size: accepted because the harness passes them, and not used.
  """

  open_model: Callable[..., LanguageModel]  # register() sets it

  def __init__(
    self,
    checkpoint: str | None = None,
    *,
    model: LanguageModel | None = None,
    batch_size: int | str = 16,
    max_gen_toks: int = MAX_NEW_TOKENS,
    device: str | None = None,
    max_batch_size: int | None = None,
    **options: Any,
  ):
    super().__init__()
    del device, max_batch_size
    if (checkpoint is None) == (model is None):
      raise ConfigError('Give --model_args checkpoint=PATH: a run, a checkpoint, or a folder.')
    rows = 16 if str(batch_size).startswith('auto') else int(_number('batch_size', batch_size, 1))
    self.model = model or self.open_model(checkpoint, batch_rows=rows, **options)
    self._max_new_tokens = int(_number('max_gen_toks', max_gen_toks, 1))
    self._chats = False

  # --- text

  @property
  def tokenizer_name(self) -> str:
    """For the harness's caches of requests."""
    return f'{self.model.name}-{self.model.fingerprint[:16]}'

  def chat_template(self, chat_template: bool | str = False) -> str:
    """Name of the template that is in use, for the harness's records."""
    return self.model.chat_template.name if chat_template else ''

  def apply_chat_template(
    self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """The text of a conversation; without the sign to answer, its last message is continued."""
    self._chats = True
    text = self.model.chat_template.text(chat_history, add_generation_prompt)
    if not add_generation_prompt:
      last = chat_history[-1]['content']
      end = text.rfind(last)
      if end < 0:
        raise ConfigError(
          f'The chat template {self.model.chat_template.name} changes the message {last[:80]!r}, '
          'which is to be continued; leave --apply_chat_template out.'
        )
      text = text[: end + len(last)]
    return text

  def _encode(self, text: str) -> list[int]:
    vocabulary = self.model.vocabulary
    if self._chats:
      return self.model.chat_template.encode(text, vocabulary.encode, int(vocabulary.eos_id))
    return list(vocabulary.encode(text))

  def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both; see prompts.split.

    Raises:
      ConfigError: the continuation has no tokens, and would be certain.
    """
    before, after = split(self._encode, context, continuation)
    if not after:
      raise ConfigError(
        f'The continuation {continuation!r} of {context[-40:]!r} has no tokens and would be '
        'certain; repair the task.'
      )
    return self._fitting(before, len(after)), after

  def _fitting(self, context: list[int], behind: int) -> list[int]:
    """A context that leaves room for so many tokens: the left of a longer one goes."""
    room = max(0, self.model.max_length - 1 - behind)
    return context[len(context) - room :] if len(context) > room else context

  # --- requests

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(log-probability, whether greedy decoding gives it) of continuations."""
    del disable_tqdm
    scores = self.model.score([self._pair(*request.args) for request in requests])
    check_finite((s.log_prob for s in scores), self.model.name, 'a continuation')
    return self._noted('loglikelihood', requests, [(s.log_prob, s.is_greedy) for s in scores])

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Log-probability of whole texts.

    Longer ones go in windows: every token is judged once, with as much before it as fits.
    """
    del disable_tqdm
    windows, owner = [], []
    for i, request in enumerate(requests):
      ids, room, end = self._encode(request.args[0]), self.model.max_length - 1, 0
      while end < len(ids):
        begin, end = end, min(len(ids), end + (room if end == 0 else max(1, room - 1)))
        windows.append((ids[max(0, end - room) : begin], ids[begin:end]))
        owner.append(i)
    totals = [0.0] * len(requests)
    for i, score in zip(owner, self.model.score(windows), strict=True):
      totals[i] += score.log_prob
    check_finite(totals, self.model.name, 'a text')
    return self._noted('loglikelihood_rolling', requests, totals)

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Continuations up to a stop string."""
    del disable_tqdm
    groups: dict[_Asked, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(self._asked(request.args[1]), []).append(i)
    texts = [''] * len(requests)
    for asked, members in groups.items():
      new = min(asked.max_new_tokens, self.model.max_length - 2)
      prompts = [self._fitting(self._encode(requests[i].args[0]), new) for i in members]
      found = self.model.generate(prompts, new, stop=asked.stop, sampling=asked.sampling)
      for i, (generation,) in zip(members, found, strict=True):
        check_finite(generation.log_probs, self.model.name, 'its text')
        texts[i] = generation.text
    return self._noted('generate_until', requests, texts)

  def _asked(self, options: Mapping[str, Any]) -> _Asked:
    """What the options of a task or of --gen_kwargs come to, as the harness understands them.

    Raises:
      ConfigError: one is of another type, or out of its range.
    """
    until = options.get('until') or ()
    until = (until,) if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
      raise ConfigError(f'until={until!r} must be a text or a list of texts.')
    stop = (*until, *(self.model.chat_template.stop if self._chats else ()))
    new = next((options[n] for n in _LENGTHS if options.get(n) is not None), self._max_new_tokens)
    new = _number(_LENGTHS[0], new, 1)
    return _Asked(tuple(dict.fromkeys(s for s in stop if s)), int(new), _sampling(options))

  def _noted(self, kind: str, requests, results: list) -> list:
    """Lets the harness keep results as they come (--use_cache)."""
    for request, result in zip(requests, results, strict=True):
      self.cache_hook.add_partial(kind, request.args, result)
    return results


def register(open_model: Callable[..., LanguageModel]) -> type:
  """Makes `--model openmoe` known to the harness; returns the class.

  Args:
    open_model: (checkpoint, batch_rows=..., **options of --model_args) -> model.

  Raises:
    ConfigError: the harness is not installed.
  """
  try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
  except ImportError as error:
    raise ConfigError(
      f'The evaluation harness cannot be imported ({error}): `bash scripts/setup_env.sh eval`.'
    ) from error
  members = {'open_model': staticmethod(open_model)}
  return register_model(NAME)(type('OpenMoEHarness', (Adapter, LM), members))
