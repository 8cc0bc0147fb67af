"""What is written down of a step, and when a run must not go on."""

from __future__ import annotations

import dataclasses
import math
import os

import jax
import numpy as np

from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.config import TrainConfig
from openmoe.observe.metrics import MetricsWriter
from openmoe.types import Batch


class NonFiniteLoss(RuntimeError):
  """Training diverged; the message names the step, the batch and the last good checkpoint."""

  exit_code = 65


def record_step(
  run: TrainConfig,
  step: int,
  metrics: dict,
  batch: Batch,
  writer: MetricsWriter,
  checkpointer: Checkpointer,
) -> None:
  """Writes one step's metrics when due; stops the run when they are not finite."""
  scalars = {name: float(value) for name, value in metrics['scalars'].items()}
  if not all(math.isfinite(scalars[name]) for name in ('loss', 'grad_norm')):
    _diverged(run, step, scalars, batch, checkpointer)
  router = metrics['router']
  if router is not None:
    loads_le = np.asarray(router.expert_load_e)
    scalars['dropped_fraction'] = float(np.mean(router.dropped_fraction))
    scalars['expert_usage'] = float(np.mean(router.expert_usage))
    scalars['router_confidence'] = float(np.mean(router.router_confidence))
    scalars['tokens_left_behind'] = float(np.mean(router.tokens_left_behind))
    if step % run.router_period == 0:
      writer.write_router(
        step,
        {'expert_load': loads_le, 'dropped_fraction': np.asarray(router.dropped_fraction)},
      )
  if step % run.log_period == 0 or step == run.total_steps:
    writer.write(step, scalars)


def _diverged(
  run: TrainConfig, step: int, scalars: dict, batch: Batch, checkpointer: Checkpointer
) -> None:
  """Keeps the batch for inspection and raises NonFiniteLoss."""
  name = f'nonfinite_step_{step}_process_{jax.process_index()}.npz'
  path = os.path.join(run.model_dir, name)
  if '://' in run.model_dir:
    path = os.path.abspath(name)
  np.savez(path, **{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
  saved = checkpointer.newest()
  good = 'none was written' if saved is None else f'checkpoint_{saved}'
  raise NonFiniteLoss(
    f'Step {step}: loss {scalars["loss"]}, gradient norm {scalars["grad_norm"]}. Its batch is in '
    f'{path}; the last good checkpoint: {good}. Start again with a lower learning rate, or look at '
    f'the batch.'
  )
