"""The training step with a limit and a brake: what a rule decided, done inside the compiled step.

Loss and gradient norm are the same in all processes, so is what follows from them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from openmoe.types import Array, PyTree


def guarded(step: Callable) -> Callable:
  """A train_step that takes a third argument, `controls`: float32 scalars by name.

    rate_scale  what the learning rate is multiplied with
    loss, grad_norm  values above which a step changes neither parameters nor optimizer, as does a
                     step in which one of them is not finite; inf for no limit

  Counters go on, so a skipped step is a batch that was read and left out, and the schedule of the
  learning rate does not wait for it. Its metrics gain `skipped`, 0 or 1.
  """

  def run(state, batch, controls: dict[str, Array], *, optimizer, **fixed):
    rate = controls['rate_scale']

    def update(grads, opt_state, params):
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return jax.tree.map(lambda u: u * rate, updates), opt_state

    slowed = optax.GradientTransformation(optimizer.init, update)
    new, metrics = step(state, batch, optimizer=slowed, **fixed)
    scalars = metrics['scalars']
    keep = jnp.bool_(True)
    for name in ('loss', 'grad_norm'):
      keep &= jnp.isfinite(scalars[name]) & (scalars[name] <= controls[name])
    choose = lambda new, old: jax.tree.map(lambda a, b: _unless_counter(keep, a, b), new, old)
    new = new.replace(
      params=choose(new.params, state.params), opt_state=choose(new.opt_state, state.opt_state)
    )
    scalars |= {
      'skipped': 1.0 - keep.astype(jnp.float32),
      'learning_rate': scalars['learning_rate'] * rate,
    }
    return new, metrics | {'scalars': scalars}

  return run


def _unless_counter(keep: Array, new: PyTree, old: PyTree) -> Array:
  return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(keep, new, old)
