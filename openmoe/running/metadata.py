"""What training writes down in a checkpoint, and compares when it goes on from one."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from openmoe.checkpoint import description
from openmoe.config import ConfigError, ModelConfig, OptimizerConfig, TrainConfig
from openmoe.data.vocabulary import vocabulary_file
from openmoe.programme import Programme


class RunMetadata:
  """What a run's checkpoints say: of the run for people, and their description for programs.

  Args:
    run, model, optimizer, programme: as train() has them.

  Raises:
    ConfigError: the vocabulary's file is not there.
  """

  def __init__(
    self, run: TrainConfig, model: ModelConfig, optimizer: OptimizerConfig, programme: Programme
  ):
    self._run, self._programme = run, programme
    self._file = vocabulary_file(programme.stages[-1].data.mixture_or_task_name)
    self._whole = description.Description(
      model,
      vocabulary=description.vocabulary_record(*self._file) if self._file else None,
      optimizer=description.optimizer_record(optimizer),
    )

  def keep_vocabulary(self) -> None:
    """Puts the vocabulary's file into the run directory; for one process."""
    if self._file:
      description.keep_vocabulary(self._run.model_dir, self._whole.vocabulary, self._file.content)

  def __call__(self, step: int) -> dict[str, Any]:
    """The metadata of the checkpoint of a step, JSON-able."""
    programme = self._programme
    stage = programme.stages[programme.at(min(max(step, 1), programme.total_steps) - 1)[0]]
    data = stage.data
    described = dataclasses.replace(
      self._whole,
      row_length=data.row_length,
      objective='prefix' if 'inputs' in data.task_feature_lengths else 'causal',
      tokens_seen=programme.tokens_before(step),
    )
    return {
      'tokens_seen': programme.tokens_before(step),
      'stage': stage.name,
      'mixture': data.mixture_or_task_name,
      'task_feature_lengths': dict(data.task_feature_lengths),
      'data_seed': data.seed,
      'seed': self._run.seed,
      description.KEY: described.plain(),
      'saved_at': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    }


def data_changed(run: TrainConfig, now: dict, metadata: dict, step: int) -> bool:
  """Whether the checkpoint was made on other data, from which this run may go on.

  Raises:
    ConfigError: other data, and run.allow_data_change is off.
  """
  names = [n for n in ('mixture', 'task_feature_lengths') if metadata.get(n) != now[n]]
  if names and not run.allow_data_change:
    changes = '; '.join(f'{n} is {metadata.get(n)} there and {now[n]} here' for n in names)
    raise ConfigError(
      f'checkpoint_{step} was trained on other data: {changes}. To go on with the new data from '
      f'its beginning set ALLOW_DATA_CHANGE = True; or use another MODEL_DIR.'
    )
  return bool(names)
