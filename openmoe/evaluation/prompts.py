"""Prompts and continuations as token ids: what fits, and where a continuation begins."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.evaluation.items import EvaluationTask, Item, Prompt

Encode = Callable[[str], Sequence[int]]


class PromptMode(enum.Enum):
  """How prompts are made and cut.

  REFERENCE: as the released evaluation did, quirks kept; a prompt that is too long loses its end,
    and with it the question.
  FIXED: a prompt that is too long loses shots, first ones first; the question stays.
  """

  REFERENCE = 'reference'
  FIXED = 'fixed'


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A prompt as the model gets it.

  Attributes:
    text: with the shots that are left.
    ids: its tokens.
    shots: how many are left.
    cut: tokens that were cut off: at the end in reference mode, else at the beginning.
  """

  text: str
  ids: tuple[int, ...]
  shots: int
  cut: int


def fit(
  prompt: Prompt, room: int, encode: Encode, mode: PromptMode, input_length: int | None = None
) -> Fitted:
  """A prompt in at most `room` tokens; see PromptMode.

  In fixed mode the shots go one by one, and only when the bare question is still too long does its
  beginning go. In reference mode input_length is a limit as well.
  """
  if mode is PromptMode.REFERENCE:
    ids, length = encode(prompt.text()), min(room, input_length or room)
    return Fitted(prompt.text(), tuple(ids[:length]), len(prompt.shots), max(0, len(ids) - length))
  for shots in range(len(prompt.shots), -1, -1):
    ids = encode(prompt.text(shots))
    if len(ids) <= room:
      return Fitted(prompt.text(shots), tuple(ids), shots, 0)
  return Fitted(prompt.text(0), tuple(ids[len(ids) - room :]), 0, len(ids) - room)


def split(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """Tokens of a context and its continuation, tokenised as one text as the evaluation harness does.

  Spaces at the end of a context belong to the first word of the continuation, and the split is
  where the context's own tokens end. A continuation that melts into the context's last token would
  have none of its own, and be certain: then it begins with the first token that it changes. One
  that the tokenizer overlooks behind a context counts by itself.

  Returns:
    (context, continuation); the latter is empty only if it has no tokens anywhere.
  """
  bare = context.rstrip()
  continuation, context = context[len(bare) :] + continuation, bare
  whole, first = list(encode(context + continuation)), list(encode(context))
  end = len(first)
  if len(whole) <= end:
    pairs = enumerate(zip(whole, first, strict=False))
    end = next((i for i, (one, other) in pairs if one != other), len(whole))
  if whole[end:]:
    return whole[:end], whole[end:]
  return first, list(encode(continuation))


class Encoder:
  """Prompts and choices of one task to ids, for one model and mode."""

  def __init__(self, vocabulary: Any, max_length: int, mode: PromptMode, task: EvaluationTask):
    self._vocabulary = vocabulary
    self._max_length = max_length
    self._mode = mode
    self._task = task

  def ids(self, text: str) -> list[int]:
    return [int(i) for i in self._vocabulary.encode(text)]

  def _fit(self, prompt: Prompt, after: int) -> Fitted:
    room = self._max_length - 1 - after  # 1 for the id 0 that begins every sequence
    if room < 1:
      raise ConfigError(
        f'{self._task.name}: {after} tokens after the prompt leave none of the {self._max_length} '
        'of the model; lower max_new_tokens, or leave the task out.'
      )
    return fit(prompt, room, self.ids, self._mode, self._task.reference_length)

  def question(self, item: Item, new_tokens: int) -> Fitted:
    return self._fit(item.prompt, new_tokens)

  def choices(self, item: Item) -> tuple[list[Fitted], list[list[int]]]:
    """(prompt, continuation ids) of every choice; all of them keep the same number of shots.

    Raises:
      ConfigError: a choice has no tokens, which would be certain, or too many.
    """
    eos = [self._vocabulary.eos_id] if self._task.append_eos else []
    alone = [self.ids(choice) + eos for choice in item.choices]
    longest = max(map(len, alone))
    while True:
      prompts = self._prompts(item, longest)
      pairs = [self._pair(*given, eos) for given in zip(prompts, item.choices, alone, strict=True)]
      for choice, (_, after) in zip(item.choices, pairs, strict=True):
        if not after and self._mode is PromptMode.FIXED:
          raise ConfigError(
            f'{self._task.name}: choice {choice!r} of item {item.name} has no tokens and would be '
            'certain; repair the item.'
          )
      # Prompt and choice as one text may have more tokens than each by itself.
      excess = max(len(prompt.ids) + len(after) for prompt, after in pairs) - self._max_length + 1
      if excess <= 0:
        return [prompt for prompt, _ in pairs], [after for _, after in pairs]
      longest += excess

  def _prompts(self, item: Item, after: int) -> list[Fitted]:
    """The prompt of every choice, with room for so many tokens."""
    if not item.prompts:
      return [self._fit(item.prompt, after)] * len(item.choices)
    shots = min(self._fit(prompt, after).shots for prompt in item.prompts)
    least = [dataclasses.replace(p, shots=p.shots[len(p.shots) - shots :]) for p in item.prompts]
    return [self._fit(prompt, after) for prompt in least]

  def _pair(
    self, prompt: Fitted, choice: str, alone: list[int], eos: list[int]
  ) -> tuple[Fitted, list[int]]:
    """(prompt, tokens after it) of a choice; `alone` are those of the choice by itself."""
    if not self._task.joint or (prompt.cut and self._mode is PromptMode.REFERENCE):
      return prompt, alone
    context, after = split(self.ids, prompt.text, choice)
    after = after + eos
    if prompt.cut:
      room = max(1, self._max_length - 1 - len(after))
      context = context[max(0, len(context) - room) :]
    return dataclasses.replace(prompt, ids=tuple(context)), after


def check_finite(values: Iterable[float], model: str, what: str) -> None:
  """Raises ConfigError where a log-probability is no number that can be compared."""
  for value in values:
    if not math.isfinite(value):
      raise ConfigError(
        f'{model} gives {what} the log-probability {value}: its weights or activations are not '
        'finite, and no score is written. `python -m convert fsck` names such weights; '
        'DTYPE=float32 holds larger activations.'
      )
