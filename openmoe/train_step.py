"""The state of training, and the step: a pure function of (state, batch)."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from openmoe import partitioning
from openmoe.config import ModelConfig, OptimizerConfig
from openmoe.losses import router_losses, token_loss
from openmoe.microbatches import accumulate
from openmoe.models import abstract_params, empty_batch
from openmoe.optimizer import learning_rate, make_optimizer, optimizer_axes
from openmoe.types import Array, Batch, PyTree


@flax.struct.dataclass
class TrainState:
  """Everything that an optimizer step changes.

  Attributes:
    step: int32 scalar, optimizer steps done.
    params: nested dict of float32 arrays.
    opt_state: of the optimizer.
  """

  step: Array
  params: PyTree
  opt_state: PyTree


def init_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
  """Step 0. A function of the seed alone: threefry keys, the same on every mesh."""
  with partitioning.without_mesh():
    variables = model.init(jax.random.key(seed), empty_batch(1, 8), train=False)
  params = nn.unbox(variables['params'])
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[TrainState, PyTree]:
  """(TrainState of shapes, logical axes of the parameters); nothing is allocated."""
  shapes, axes = abstract_params(model)
  transform = make_optimizer(optimizer, axes, learning_rate(optimizer, 1))
  opt_state = jax.eval_shape(transform.init, shapes)
  return TrainState(jax.ShapeDtypeStruct((), 'int32'), shapes, opt_state), axes


def state_shardings(
  mesh: jax.sharding.Mesh,
  config: OptimizerConfig,
  abstract: TrainState,
  param_axes: PyTree,
  fsdp: bool,
) -> TrainState:
  """NamedShardings of every array of the state."""
  axes = TrainState(
    step=(),
    params=param_axes,
    opt_state=optimizer_axes(config, abstract.opt_state, abstract.params, param_axes),
  )
  rules = partitioning.axis_rules(fsdp)
  return jax.tree.map(
    lambda leaf, names: jax.sharding.NamedSharding(
      mesh, partitioning.logical_to_spec(names, rules)
    ),
    abstract,
    axes,
  )


def loss_fn(
  params: PyTree,
  batch: Batch,
  normalizer: Array,
  key: Array,
  model: nn.Module,
  config: ModelConfig,
  train: bool,
  share: float = 1.0,
) -> tuple[Array, dict]:
  """Total loss of one (micro)batch and its parts.

  Args:
    normalizer: float32, target tokens of the whole global batch; the token loss is divided by
      it, so the parts of a batch add up to the loss of the batch.
    share: what part of the batch this is; router losses and statistics, means by nature, are
      scaled by it so that they add up too.

  Returns:
    The total, and {'scalars': ..., 'router': RouterStats or None}.
  """
  rngs = {'dropout': key} if train else {}
  out = model.apply({'params': params}, batch, train=train, rngs=rngs)
  d = out.hidden_btd.shape[-1]
  tokens = token_loss(
    out.hidden_btd.reshape(-1, d),
    out.output_kernel_dv,
    batch.targets.reshape(-1),
    batch.loss_weights.reshape(-1) / normalizer,
    config.logit_z_weight,
    config.vocab_block,
  )
  stats = jax.tree.map(lambda x: x * share, out.router_stats)
  routers = router_losses(stats, config.moe)
  scalars = {
    'cross_entropy': tokens.total - tokens.logit_z_loss,
    'logit_z_loss': tokens.logit_z_loss,
    'accuracy': tokens.correct,
    **routers,
  }
  return tokens.total + sum(routers.values()), {'scalars': scalars, 'router': stats}


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  num_microbatches: int,
  seed: int,
) -> tuple[TrainState, dict]:
  """One optimizer step.

  Gradients of the microbatches are added in float32. The token loss is weighted by the target
  tokens of the whole global batch, so the number of microbatches does not change it; the router
  losses are averaged over microbatches.

  Returns:
    The new state, and {'scalars': {...}, 'router': RouterStats with leading l, or None}.
  """
  normalizer = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
  step_key = jax.random.fold_in(jax.random.key(seed), state.step)
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def gradients(index, piece):
    key = jax.random.fold_in(step_key, index)
    share = 1.0 / num_microbatches
    return grad_fn(state.params, piece, normalizer, key, model, config, True, share)

  if num_microbatches == 1:
    (_, aux), grads = gradients(0, batch)
  else:
    grads, aux = accumulate(gradients, batch, num_microbatches)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  scalars = aux['scalars'] | {
    'loss': sum(v for k, v in aux['scalars'].items() if k != 'accuracy'),
    'grad_norm': optax.global_norm(grads),
    'learning_rate': schedule(state.step),
    'target_tokens': jnp.sum(batch.loss_weights),
    'nonpadding_fraction': jnp.mean((batch.targets > 0).astype(jnp.float32)),
  }
  new_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
  return new_state, {'scalars': scalars, 'router': aux['router']}
