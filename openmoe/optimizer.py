"""Learning-rate schedules, AdamW, and Adafactor exactly as t5x defines it.

Optimizers are optax transformations whose update already contains the learning rate. Parameters
of scanned layers are stacked; Adafactor treats the stacking axes, and the expert axis, as batch
axes, so every layer and every expert is clipped and scaled on its own as if it stood alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from openmoe.config import OptimizerConfig, OptimizerName, Schedule
from openmoe.types import Array, PyTree

STACK_AXES = ('groups', 'layers')
BATCH_AXES = (*STACK_AXES, 'expert')
EPSILON_GRAD = 1e-30  # added to squared gradients
EPSILON_SCALE = 1e-3  # least root mean square that a parameter is taken to have


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """step (0-based, before the update) -> learning rate, float32.

  RSQRT is t5x's 'constant * rsqrt_decay': flat at base / sqrt(warmup) and then base / sqrt(step);
  there is no linear part. WSD decays exponentially over the last decay_steps, from base to
  final_fraction * base.
  """
  base, warmup = config.learning_rate, config.warmup_steps
  linear = lambda step: jnp.minimum(1.0, (step + 1) / max(warmup, 1))

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    match config.schedule:
      case Schedule.CONSTANT:
        return jnp.full_like(step, base)
      case Schedule.RSQRT:
        return jnp.maximum(base / jnp.sqrt(jnp.maximum(step, warmup)), 1e-8)
      case Schedule.LINEAR_WARMUP:
        return base * linear(step)
      case Schedule.COSINE:
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        final = config.final_fraction
        return base * linear(step) * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))
      case Schedule.WSD:
        start = total_steps - config.decay_steps
        progress = jnp.clip((step - start) / config.decay_steps, 0.0, 1.0)
        return base * linear(step) * config.final_fraction**progress

  return schedule


class Factoring(NamedTuple):
  """How one parameter's second moment is kept.

  Attributes:
    average: dimensions that share one scale and one clipping: all but the batch axes.
    row, column: None where the moment is not factored; else the dimensions whose means are kept,
      v_row over the rows (column averaged away), v_col over the columns.
  """

  average: tuple[int, ...]
  row: tuple[int, ...] | None = None
  column: tuple[int, ...] | None = None


def factoring(shape: tuple[int, ...], axes: tuple[str, ...], min_size: int) -> Factoring:
  """t5x's factoring rules for one (possibly stacked) parameter.

  Matrices of a single layer: factored along the two sides when the smaller has min_size, the
  smaller being the row (of equal ones the first). Expert matrices: always, embed is the row. The
  double gate [d, 2, f] counts as the matrix [d, 2f] that the original stores.
  Sources: t5x adafactor.py `_parse_rule`, `_factored_dims`; contrib/moe adafactor_utils.py.
  """
  average = tuple(i for i, axis in enumerate(axes) if axis not in BATCH_AXES)
  sides: list[tuple[int, ...]] = []
  for i in average:
    if i > 0 and axes[i - 1] == 'gate':
      sides[-1] = (*sides[-1], i)  # gate and hidden units make one side
    else:
      sides.append((i,))
  if len(sides) != 2:
    return Factoring(average)
  if 'expert' in axes:
    row, column = sides if axes[sides[0][0]] == 'embed' else sides[::-1]
    return Factoring(average, row, column)
  sizes = [int(np.prod([shape[i] for i in side])) for side in sides]
  if min(sizes) < min_size:
    return Factoring(average)
  row, column = sides if sizes[0] <= sizes[1] else sides[::-1]
  return Factoring(average, row, column)


class Moments(NamedTuple):
  """Adafactor's slots of one parameter, float32; those not in use are None."""

  v: Array | None
  v_row: Array | None
  v_col: Array | None


class AdafactorState(NamedTuple):
  count: Array
  moments: PyTree


def _is_axes(x) -> bool:
  return isinstance(x, tuple) and all(isinstance(a, str) for a in x)


def _without(items, dims):
  return tuple(x for i, x in enumerate(items) if i not in dims)


def adafactor(config: OptimizerConfig, axes: PyTree, schedule: optax.Schedule):
  """Adafactor with parameter scaling, update clipping at 1, no momentum, no weight decay.

  Args:
    axes: tree of logical-axis tuples, shaped like the parameters.
  """

  def init_one(param, names):
    rule = factoring(param.shape, names, config.min_dim_size_to_factor)
    zeros = lambda shape: jnp.zeros(shape, jnp.float32)
    if rule.row is None:
      return Moments(v=zeros(param.shape), v_row=None, v_col=None)
    shapes = _without(param.shape, rule.column), _without(param.shape, rule.row)
    return Moments(v=None, v_row=zeros(shapes[0]), v_col=zeros(shapes[1]))

  def init(params):
    return AdafactorState(jnp.zeros((), jnp.int32), jax.tree.map(init_one, params, axes))

  def update_one(grad, moments, param, names, decay, rate):
    rule = factoring(param.shape, names, config.min_dim_size_to_factor)
    mean = lambda x, dims: jnp.mean(x, axis=dims, keepdims=True)
    grad, param = grad.astype(jnp.float32), param.astype(jnp.float32)
    square = jnp.square(grad) + EPSILON_GRAD
    decayed = lambda old, new: decay * old + (1.0 - decay) * new
    if rule.row is None:
      moments = moments._replace(v=decayed(moments.v, square))
      y = grad * moments.v**-0.5
    else:
      v_row = decayed(moments.v_row, jnp.mean(square, axis=rule.column))
      v_col = decayed(moments.v_col, jnp.mean(square, axis=rule.row))
      moments = Moments(v=None, v_row=v_row, v_col=v_col)
      rows = jnp.expand_dims(v_row, rule.column)
      y = grad * (rows / mean(rows, rule.row)) ** -0.5
      y = y * jnp.expand_dims(v_col, rule.row) ** -0.5
    y = y / jnp.maximum(1.0, jnp.sqrt(mean(jnp.square(y), rule.average)))
    scale = jnp.maximum(jnp.sqrt(mean(jnp.square(param), rule.average)), EPSILON_SCALE)
    return -rate * scale * y, moments

  def update(grads, state, params):
    # Squared gradients are averaged with weight t^-0.8, so the first step forgets the zeros.
    decay = 1.0 - (state.count.astype(jnp.float32) + 1.0) ** -config.decay_rate
    rate = schedule(state.count)
    flat_grads, tree = jax.tree.flatten(grads)
    flat = [tree.flatten_up_to(t) for t in (state.moments, params, axes)]
    pairs = [update_one(*leaves, decay, rate) for leaves in zip(flat_grads, *flat, strict=True)]
    updates, moments = zip(*pairs, strict=True)
    new_state = AdafactorState(state.count + 1, tree.unflatten(moments))
    return tree.unflatten(updates), new_state

  return optax.GradientTransformation(init, update)


def make_optimizer(
  config: OptimizerConfig, axes: PyTree, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """The configured optimizer; its updates are added to the parameters.

  Args:
    axes: tree of logical-axis tuples, shaped like the parameters.
    schedule: step -> learning rate, such as learning_rate(config, total_steps).
  """
  match config.name:
    case OptimizerName.ADAFACTOR:
      optimizer = adafactor(config, axes, schedule)
    case OptimizerName.ADAMW:
      optimizer = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        # Decaying a norm's scale pulls it to 0, not to its neutral 1.
        mask=jax.tree.map(lambda a: len(_without_stack(a)) > 1, axes, is_leaf=_is_axes),
      )
  if config.clip_global_norm is not None:
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_global_norm), optimizer)
  return optimizer


def _without_stack(axes: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(a for a in axes if a not in STACK_AXES)


def optimizer_axes(config: OptimizerConfig, state: PyTree, params: PyTree, axes: PyTree) -> PyTree:
  """Logical axes of every array of an optimizer state, shaped like the state.

  Args:
    state, params: arrays or shapes of the optimizer state and the parameters.
    axes: logical axes of the parameters.
  """

  def of_param(leaf, param, names):
    if not isinstance(leaf, Moments):
      return names
    rule = factoring(param.shape, names, config.min_dim_size_to_factor)
    if rule.row is None:
      return Moments(v=names, v_row=None, v_col=None)
    return Moments(v=None, v_row=_without(names, rule.column), v_col=_without(names, rule.row))

  def walk(node):
    if isinstance(node, AdafactorState):
      is_moments = lambda x: isinstance(x, Moments)
      moments = jax.tree.map(of_param, node.moments, params, axes, is_leaf=is_moments)
      return AdafactorState((), moments)
    if jax.tree.structure(node) == jax.tree.structure(params):
      return axes
    if isinstance(node, tuple):
      parts = [walk(part) for part in node]
      return type(node)(*parts) if hasattr(node, '_fields') else tuple(parts)
    return ()

  return walk(state)
