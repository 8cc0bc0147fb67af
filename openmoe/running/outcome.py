"""How a run ended, and why."""

from __future__ import annotations

import dataclasses
import enum

import jax
from absl import logging

from openmoe.checkpoint.paths import Unreadable
from openmoe.config import TrainConfig
from openmoe.observe import pictures
from openmoe.programme import Programme
from openmoe.types import PyTree


class End(enum.Enum):
  """Why a run made no further step."""

  COMPLETE = 'complete'  # total_steps are done
  STOPPED = 'stopped'  # by a signal; the same command continues
  DATA = 'data'  # the training data ended first


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    step: optimizer steps done.
    end: why no step followed.
    resumed_from: step it was restored at, None for a fresh start.
    validation_loss: nats per target token, None without evaluation.
    unigram_entropy: of the validation targets, nats; what knowing only frequencies would give.
    params: the parameters, on the mesh.
  """

  step: int
  end: End
  resumed_from: int | None
  validation_loss: float | None
  unigram_entropy: float | None
  params: PyTree

  @property
  def complete(self) -> bool:
    """Whether all steps of the run are done."""
    return self.end is End.COMPLETE


def show_run(model_dir: str) -> None:
  """Draws the pictures of a run into its directory; what cannot be drawn is told."""
  if jax.process_index():
    return
  try:
    pictures.plot_run(model_dir)
  except (OSError, Unreadable) as error:
    logging.warning('The pictures of the run could not be drawn: %s', error)


def why_ended(run: TrainConfig, end: End, step: int, programme: Programme) -> str:
  """A sentence on a run that did not make all its steps."""
  if end is End.STOPPED:
    when = f'after step {step}' if step else 'before the first step'
    return f'Stopped by a signal {when}; the same command continues.'
  stage = programme.stages[programme.at(step)[0]]
  return (
    f'The data of stage {stage.name!r} ended after step {step} of {run.total_steps}, which is '
    f'saved: num_epochs={stage.data.num_epochs} of {stage.data.mixture_or_task_name} gives no more '
    f'batches. Set TRAIN_STEPS = {step}, or num_epochs = None to repeat the data, or give more.'
  )
