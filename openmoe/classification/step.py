"""Training of models.classifier: shapes, loss and step, pure functions as in train_step.py."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from openmoe import partitioning
from openmoe.config import ModelConfig
from openmoe.losses import router_losses
from openmoe.models import empty_batch
from openmoe.models.classifier import SequenceClassifier
from openmoe.train_step import TrainState
from openmoe.types import Array, Batch, PyTree


def abstract_classifier(config: ModelConfig, num_classes: int) -> tuple[PyTree, PyTree]:
  """(shapes, logical axes) of the parameters, without allocating any."""
  model = SequenceClassifier(config, num_classes)
  with partitioning.without_mesh():
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), empty_batch(1, 8), False))
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  axes = jax.tree.map(lambda box: tuple(box.names), boxed['params'], is_leaf=is_box)
  return nn.unbox(boxed['params']), axes


def classification_loss(
  params: PyTree,
  batch: Batch,
  labels_b: Array,
  key: Array,
  *,
  model: nn.Module,
  config: ModelConfig,
  train: bool,
) -> tuple[Array, dict[str, Array]]:
  """Mean cross-entropy over the rows plus the router losses, and its parts with the accuracy.

  Args:
    labels_b: int32 classes.
  """
  rngs = {'dropout': key} if train else {}
  out = model.apply({'params': params}, batch, train=train, rngs=rngs)
  losses = optax.softmax_cross_entropy_with_integer_labels(out.logits_bY, labels_b)
  parts = {'cross_entropy': jnp.mean(losses), **router_losses(out.router_stats, config.moe)}
  accuracy = jnp.mean((jnp.argmax(out.logits_bY, axis=-1) == labels_b).astype(jnp.float32))
  return sum(parts.values()), {**parts, 'accuracy': accuracy}


def classification_step(
  state: TrainState,
  batch: Batch,
  labels_b: Array,
  *,
  model: nn.Module,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  seed: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  grad_fn = jax.value_and_grad(classification_loss, has_aux=True)
  (loss, parts), grads = grad_fn(
    state.params, batch, labels_b, key, model=model, config=config, train=True
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
  return state, {**parts, 'loss': loss}
