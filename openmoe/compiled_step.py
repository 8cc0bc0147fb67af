"""The training step of a run, as it is compiled: the same for a run and for a plan of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import optax

from openmoe.config import ModelConfig, TrainConfig
from openmoe.models import build_model
from openmoe.train_step import TrainState, train_step


def jit_step(
  run: TrainConfig,
  model: ModelConfig,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  shardings: TrainState,
  guard: Callable = lambda step: step,
) -> Callable:
  """The compiled step of a run, (state, batch) -> (state, metrics), on the mesh of `shardings`.

  Args:
    guard: puts something around train_step, see Watch.guard; what it adds to the arguments stays.
  """
  fixed = {'model': build_model(model), 'config': model, 'optimizer': optimizer}
  fixed |= {'num_microbatches': run.num_microbatches, 'seed': run.seed, 'schedule': schedule}
  step = functools.partial(guard(train_step), **fixed)
  replicated = jax.sharding.NamedSharding(shardings.step.mesh, jax.sharding.PartitionSpec())
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))
