"""Whether what a prompt gives depends on its batch: the same prompts asked for in several ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from openmoe.config import ConfigError
from openmoe.inference.model import LanguageModel
from openmoe.inference.rows import Generation

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Row:
  """How one way of asking differs from asking for each prompt alone.

  Attributes:
    way: of asking.
    tokens: new tokens that are not the same, up to the first of each prompt.
    log_prob: largest difference of a token's logarithm, before the first other token.
    dropped: share of choices that found no slot.
  """

  way: str
  tokens: int
  log_prob: float
  dropped: float


def ways(
  model: LanguageModel, prompts: Sequence[Ids], new: int
) -> dict[str, Callable[[LanguageModel], list[Generation]]]:
  """Ways to ask a model for continuations of the prompts, each in their order."""
  ask = lambda model, rows: [found for (found,) in model.generate(rows, new)]
  order = np.random.default_rng(0).permutation(len(prompts))
  back = np.argsort(order)
  most = model.max_length - new - 2
  longest = max(map(len, prompts))
  # As long as fits: all other rows are padded to it.
  long_row = [prompts[0][i % len(prompts[0])] for i in range(max(longest, most))]
  # One token again and again goes to the same experts, which leaves others no slot.
  crowd = [[prompts[0][-1]] * longest for _ in range(max(1, 2 * len(prompts)))]
  shuffled = lambda model: ask(model, [prompts[i] for i in order])
  return {
    'in one batch': lambda model: ask(model, prompts),
    'shuffled': lambda model: [shuffled(model)[i] for i in back],
    'padded to a long one': lambda model: ask(model, [*prompts, long_row])[: len(prompts)],
    'among hostile ones': lambda model: ask(model, [*prompts, *crowd])[: len(prompts)],
  }


def check(
  model: LanguageModel, prompts: Sequence[Ids], new: int, split: LanguageModel | None = None
) -> list[Row]:
  """How the ways of asking differ.

  Args:
    prompts: token ids without the one that begins a sequence.
    new: tokens to continue each by.
    split: the same model on several devices.

  Raises:
    ConfigError: a prompt is empty or too long, or there is none.
  """
  if not prompts or not all(prompts):
    raise ConfigError(f'{len(prompts)} prompts: at least one is needed, and none may be empty.')
  before = model.drops
  alone = [model.generate([prompt], new)[0][0] for prompt in prompts]
  rows = [Row('alone', 0, 0.0, _share(model, before))]
  asked = [(name, way, model) for name, way in ways(model, prompts, new).items()]
  if split is not None:
    asked.append(('over devices', ways(split, prompts, new)['in one batch'], split))
  for name, way, one in asked:
    before = one.drops
    found = way(one)
    pairs = [_difference(a, b) for a, b in zip(alone, found, strict=True)]
    worst = max((log_prob for _, log_prob in pairs), default=0.0)
    rows.append(Row(name, sum(count for count, _ in pairs), worst, _share(one, before)))
  return rows


def _share(model: LanguageModel, before: tuple[float, float]) -> float:
  """Share of choices dropped since."""
  dropped, routed = (now - then for now, then in zip(model.drops, before, strict=True))
  return dropped / routed if routed else 0.0


def _difference(a: Generation, b: Generation) -> tuple[int, float]:
  """(tokens from the first other one on, largest difference of a logarithm before it)."""
  longest, shortest = max(len(a.tokens), len(b.tokens)), min(len(a.tokens), len(b.tokens))
  differ = (i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y)
  same = next(differ, shortest)
  logs = np.abs(np.subtract(a.log_probs[:same], b.log_probs[:same]))
  return longest - same, float(logs.max(initial=0.0))
