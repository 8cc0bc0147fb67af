"""Benchmarks while a model trains: their figures join the metrics of each validation."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from openmoe.config import ConfigError, ModelConfig
from openmoe.config.step import check_fields
from openmoe.evaluation.items import EvaluationTask
from openmoe.evaluation.run import EvaluationConfig, answer
from openmoe.inference.model import LanguageModel
from openmoe.types import PyTree

OF_LOSS = ('loss', 'accuracy')  # figures of the validation split that checkpoints are kept by


@dataclasses.dataclass(frozen=True)
class DuringTraining:
  """What is evaluated every eval_period steps, beside the loss of the validation split.

  Attributes:
    tasks: names of the catalogue; () for none.
    data_dir, bigbench_dir: where their files lie.
    max_items: the first so many items of each.
    prompt_mode: 'fixed' or 'reference'.
  """

  tasks: tuple[str, ...] = ()
  data_dir: str = 'runs/evaluation_data'
  bigbench_dir: str = 'runs/bigbench_lite'
  max_items: int = 100
  prompt_mode: str = 'fixed'

  def __post_init__(self):
    check_fields(self)


class _Quiet:
  """A display that shows nothing."""

  def begin(self, task: str, items: int) -> None: ...

  def advance(self, items: int) -> None: ...

  def end(self, result: Mapping[str, Any], resumed: bool) -> None: ...


def benchmarks(
  asked: DuringTraining,
  tasks: Sequence[EvaluationTask],
  model: ModelConfig,
  vocabulary: Any,
  max_length: int,
) -> Callable[[PyTree], dict[str, float]]:
  """params -> {'<task>/<metric>': mean over items}, for train(more_metrics=...).

  The model is copied to one device, unsharded and without capacity, as scripts.evaluate has it
  there.

  Args:
    tasks: those of `asked`.
    vocabulary: of the data.
    max_length: tokens of prompt and answer.

  Raises:
    ConfigError: there are several processes, or a task has no items.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      f'EVAL_TASKS={asked.tasks} are evaluated by one process on one device, and this run has '
      f'{jax.process_count()} processes: evaluate its checkpoints with scripts.evaluate.'
    )
  config = EvaluationConfig(
    'in training',
    'nowhere',
    asked.tasks,
    prompt_mode=asked.prompt_mode,
    max_items=asked.max_items,
  )

  def measure(params: PyTree) -> dict[str, float]:
    whole = jax.device_put(jax.device_get(params), jax.local_devices()[0])
    language = LanguageModel(model, whole, vocabulary, max_length=max_length)
    found = {}
    for task in tasks:
      for name, value in answer(language, task, config, _Quiet()).items():
        found[f'{task.name}/{name}'] = value
    return found

  def apart(params: PyTree) -> dict[str, float]:
    # The mesh that training has set is its thread's alone.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      return pool.submit(measure, params).result()

  return apart
