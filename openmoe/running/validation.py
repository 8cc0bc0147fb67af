"""Validation: the same batches, at every evaluation of a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from openmoe.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from openmoe.data.statistics import unigram_entropy
from openmoe.feed import evaluation_feed
from openmoe.train_step import loss_fn
from openmoe.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """params -> validation metrics over the same batches every time."""

  measure: Callable[[PyTree], dict[str, float]]
  batches: list[Batch]

  def __call__(self, params: PyTree) -> dict[str, float]:
    return self.measure(params)


def make_evaluation(
  run: TrainConfig,
  model: ModelConfig,
  module,
  eval_data: DataConfig | None,
  mesh: jax.sharding.Mesh,
  more: Callable[[PyTree], dict[str, float]] | None = None,
) -> Evaluation | None:
  """params -> validation metrics over the same batches every time; None when it is off.

  Args:
    more: further metrics of the parameters.
  """
  if eval_data is None or not run.eval_period or not run.eval_steps:
    return None
  batches = evaluation_feed(mesh, eval_data, run.eval_steps)
  entropy = unigram_entropy(_on_host(batches))
  step_fn = jax.jit(
    functools.partial(eval_step, model=module, config=model),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )

  def evaluate(params: PyTree) -> dict[str, float]:
    parts = [jax.device_get(step_fn(params, batch)) for batch in batches]
    totals = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
    tokens = totals['target_tokens']
    if not tokens:
      raise ConfigError(
        f'The {len(batches)} evaluation batches of {eval_data.mixture_or_task_name} hold no '
        f'target tokens; give the split more data or set EVAL_PERIOD = 0.'
      )
    found = {
      'loss': totals['cross_entropy'] / tokens,
      'accuracy': totals['correct'] / tokens,
      'unigram_entropy': entropy,
    }
    return found | (more(params) if more else {})

  return Evaluation(evaluate, batches)


def _on_host(batches: list[Batch]) -> Iterator[Batch]:
  """Global batches as numpy, on every process."""
  for batch in batches:
    if jax.process_count() == 1:
      yield jax.tree.map(np.asarray, batch)
    else:
      yield jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), batch)


def eval_step(
  params: PyTree, batch: Batch, *, model: nn.Module, config: ModelConfig
) -> dict[str, Array]:
  """Sums over one batch: 'cross_entropy', 'correct' and 'target_tokens'; eval capacity."""
  key = jax.random.key(0)
  one = jnp.ones((), jnp.float32)
  _, aux = loss_fn(params, batch, one, key, model, config, False)
  return {
    'cross_entropy': aux['scalars']['cross_entropy'],
    'correct': aux['scalars']['accuracy'],
    'target_tokens': jnp.sum(batch.loss_weights),
  }
