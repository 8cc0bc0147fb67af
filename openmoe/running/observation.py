"""What is written down of a step, and when a run must not go on."""

from __future__ import annotations

import dataclasses
import math
import os

import jax
import numpy as np

from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.config import TrainConfig
from openmoe.running.context import Running
from openmoe.types import Batch


class NonFiniteLoss(RuntimeError):
  """Training diverged; the message names the step, the batch and the last good checkpoint."""

  exit_code = 65


def record_step(at: Running, step: int, metrics: dict, batch: Batch) -> None:
  """Writes one step's metrics when due; stops the run when they are not finite, or not well.

  Raises:
    NonFiniteLoss, Unhealthy: see there.
  """
  run, writer, router = at.run, at.writer, metrics['router']
  scalars = {name: float(value) for name, value in metrics['scalars'].items()}
  finite = all(math.isfinite(scalars[name]) for name in ('loss', 'grad_norm'))
  if not finite and not scalars.get('skipped'):
    _diverged(run, step, scalars, batch, at.checkpointer)
  scalars |= at.watch.see(scalars, router)
  if router is not None and step % run.router_period == 0:
    names = {'expert_load': router.expert_load_e, 'dropped_fraction': router.dropped_fraction}
    writer.write_router(step, {name: np.asarray(x) for name, x in names.items()})
  if step % run.log_period == 0 or step == run.total_steps:
    written = writer.write(step, scalars | at.watch.summary())
    at.watch.judge(written, at.checkpointer.newest)


def look_before_saving(at: Running) -> dict:
  """Looks at the parameters that are to be saved; facts of the watch for the checkpoint.

  Raises:
    Unhealthy: a rule says that they must not be saved.
  """
  run, step = at.run, at.step
  periodic = step % run.checkpoint_period == 0 or step == run.total_steps
  with at.timeline.inside('save' if at.probe.compiled else 'compile', step):
    scalars = at.probe(at.state.params, follow=periodic)
  record = {'step': step, 'kind': 'checkpoint'} | scalars
  if periodic:
    record = at.writer.write(step, scalars, kind='checkpoint')
  at.watch.judge(record, at.checkpointer.newest)
  return at.watch.state() | at.probe.state()


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
