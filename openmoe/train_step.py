"""The training and evaluation steps: pure functions of (state, batch)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from openmoe.config import ModelConfig
from openmoe.losses import router_losses, token_loss
from openmoe.train_state import TrainState
from openmoe.types import Array, Batch, PyTree


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


def microbatches(batch: Batch, count: int) -> Batch:
  """[b, t] fields -> [count, b / count, t]; microbatch i takes rows i, i + count, ...

  Strided and not contiguous: every device then finds all its rows of every microbatch at home.
  """
  split = lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(split, batch)


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
    grads, aux = _accumulate(gradients, batch, num_microbatches)
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


def _accumulate(gradients, batch: Batch, count: int) -> tuple[PyTree, dict]:
  """Gradients and observations of the whole batch from its microbatches, one at a time."""
  pieces = microbatches(batch, count)
  part = lambda i: jax.tree.map(lambda x: x[i], pieces)
  (_, aux_shape), grads_shape = jax.eval_shape(lambda: gradients(0, part(0)))
  zeros = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), tree)

  def body(i, carry):
    grads, aux = carry
    (_, new_aux), new_grads = gradients(i, part(i))
    add = lambda a, b: a + b.astype(jnp.float32)
    return jax.tree.map(add, grads, new_grads), jax.tree.map(add, aux, new_aux)

  start = (zeros(grads_shape), zeros(aux_shape))
  grads, aux = jax.lax.fori_loop(0, count, body, start)
  return grads, aux


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
