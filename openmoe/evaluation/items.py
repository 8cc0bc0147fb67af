"""What an evaluation asks: prompts whose shots can be counted, and what a model made of them.

Tasks make Items, openmoe/evaluation/run.py shows them to a model and gets Predictions, and the
task's own functions turn both into figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What tf.strings.strip takes away; str.strip() would take more (a no-break space, for example).
ASCII_WHITESPACE = ' \t\n\v\f\r'


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A question with examples before it.

  Attributes:
    query: the question.
    shots: solved examples, the first comes first.
    prefix: stands before everything, once.
    separator: between shots, and between the last of them and the query.
    strip: whether ASCII white space at both ends is taken away.
  """

  query: str
  shots: tuple[str, ...] = ()
  prefix: str = ''
  separator: str = '\n'
  strip: bool = False

  def text(self, shots: int | None = None) -> str:
    """The whole prompt, or with only the last `shots` examples, as many as there are."""
    kept = self.shots if shots is None else self.shots[max(0, len(self.shots) - shots) :]
    text = self.prefix + self.separator.join([*kept, self.query])
    return text.strip(ASCII_WHITESPACE) if self.strip else text


@dataclasses.dataclass(frozen=True)
class Item:
  """One question of a task.

  Attributes:
    name: unique in its task; the same in every run.
    prompt: what the model sees.
    choices: continuations to score; () where text is generated.
    scores: credit for picking each of the choices.
    answers: what a generated text is compared with.
    prompts: one for each choice where they differ, instead of `prompt`.
    extra: whatever else the task's functions need, such as a program's tests.
  """

  name: str
  prompt: Prompt
  choices: tuple[str, ...] = ()
  scores: tuple[float, ...] = ()
  answers: tuple[str, ...] = ()
  prompts: tuple[Prompt, ...] = ()
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a model made of an item.

  Attributes:
    log_probs: of each choice, natural log, summed over its tokens.
    lengths: tokens of each choice.
    greedy: of each choice, whether all its tokens were the likeliest.
    texts: generated, one per sample, as the model wrote them.
  """

  log_probs: tuple[float, ...] = ()
  lengths: tuple[int, ...] = ()
  greedy: tuple[bool, ...] = ()
  texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EvaluationTask:
  """A set of items and how it is scored.

  Attributes:
    name: unique; names the result file.
    group: the row of the table that this is part of; several tasks of a group are averaged.
    items: makes the items; called when the task's turn comes.
    metric: the one that tables show.
    measure: figures of one item; a metric is their mean over items.
    measure_all: metrics that are no mean over items.
    low, high: of `metric`, for normalised scores; low is what guessing gives.
    max_new_tokens: for generated text; None is the longest answer of the task and a few more.
    stop: strings that end a generated text.
    samples: texts per item.
    temperature: 0 takes the likeliest token.
    append_eos: whether scored choices end in EOS.
    joint: tokenise prompt and choice as one text, and score what follows the prompt's own tokens;
      otherwise each by itself.
    shots: how many the items have.
    in_average: whether its group counts in the average of all.
    reference_length: in reference mode, prompts are cut to so many tokens; None for no such cut.
  """

  name: str
  group: str
  items: Callable[[], Sequence[Item]]
  metric: str
  measure: Callable[[Item, Prediction], Mapping[str, float]]
  measure_all: Callable[[Sequence[Item], Sequence[Prediction]], Mapping[str, float]] | None = None
  low: float = 0.0
  high: float = 1.0
  max_new_tokens: int | None = None
  stop: tuple[str, ...] = ()
  samples: int = 1
  temperature: float = 0.0
  append_eos: bool = False
  joint: bool = False
  shots: int = 0
  in_average: bool = True
  reference_length: int | None = None
