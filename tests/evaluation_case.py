"""A language model without a network: characters are tokens, scores are checksums."""

from __future__ import annotations

import dataclasses
import math
import zlib

import seqio


@dataclasses.dataclass(frozen=True)
class Score:
  log_prob: float
  token_log_probs: tuple[float, ...]
  is_greedy: bool


@dataclasses.dataclass(frozen=True)
class Generation:
  text: str
  tokens: tuple[int, ...]
  log_probs: tuple[float, ...]
  finish: str


class FakeModel:
  """Gives each token a checksum of what stands before it, and `reply` for every prompt.

  Attributes:
    requests: everything that was asked, in order.
  """

  name, step = 'fake', None

  def __init__(self, max_length=2000, fingerprint='f' * 64, reply='1.', shift=0.0):
    self.vocabulary = seqio.ByteVocabulary()
    self.max_length, self.fingerprint = max_length, fingerprint
    self.dropped_fraction = 0.0
    self.reply, self.shift = reply, shift
    self.requests = []

  def score(self, requests):
    return [self._score(list(context), list(after)) for context, after in requests]

  def _score(self, context, after):
    assert 1 + len(context) + len(after) <= self.max_length
    self.requests.append((tuple(context), tuple(after)))
    each = []
    for i, token in enumerate(after):
      checksum = zlib.crc32(str([*context, *after[:i], token]).encode())
      each.append(math.log((checksum + 1) / 2**33) + self.shift)
    return Score(sum(each), tuple(each), each[0] > -1.2)

  def generate(self, prompts, max_new_tokens, *, stop=(), sampling=None, samples=1, seed=0):
    del stop, sampling, seed
    found = []
    for prompt in prompts:
      assert 1 + len(prompt) + max_new_tokens <= self.max_length
      self.requests.append((tuple(prompt), ()))
      text = (
        self.reply(self.vocabulary.decode(list(prompt))) if callable(self.reply) else self.reply
      )
      found.append([Generation(text, (3,), (-0.5,), 'length')] * samples)
    return found


class Silent:
  """A display that remembers."""

  def __init__(self):
    self.ended = []

  def begin(self, task, items): ...

  def advance(self, items): ...

  def end(self, result, resumed):
    self.ended.append((result['task'], resumed))
