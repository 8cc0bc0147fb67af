"""What is looked at before a checkpoint is saved: weights of experts, and where tokens go.

Loss and gradients are seen to be finite at every step. An expert that no token chooses takes no
part in either, so its weights are looked at here, and nothing that is not finite is saved.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from openmoe.layers.moe.router import Router
from openmoe.types import Array, Batch, PyTree, Routing

TOKENS = 128  # of the first validation batch, whose choices are compared
_STACKED = ('groups', 'layers', 'expert')


class Probe:
  """Looks at parameters; every process calls it at the same steps.

  Args:
    module: the model.
    axes: logical axes of its parameters.
    batch: whose choices are followed, on the mesh; None follows none.
    mesh: of the run.

  Attributes:
    compiled: whether the first call, which compiles, is over.
  """

  def __init__(self, module: nn.Module, axes: PyTree, batch: Batch | None, mesh: jax.sharding.Mesh):
    self.compiled = False
    self._before: np.ndarray | None = None
    self._batch = batch
    replicated = NamedSharding(mesh, PartitionSpec())
    see = lambda params, batch: (
      nonfinite_experts(params, axes),
      None if batch is None else choices(module, params, batch),
    )
    self._see: Callable = jax.jit(see, out_shardings=replicated)

  def __call__(self, params: PyTree, follow: bool) -> dict[str, float]:
    """Scalars on parameters that are to be saved.

      nonfinite_experts  how many experts of all layers have a weight that is not finite
      router_saturation  share of the followed tokens' choices that are those of the time before;
                         from the second time on

    Args:
      follow: whether this time counts for router_saturation; a save that a signal has caused does
        not, so that a run which was stopped has the records of one which was not.
    """
    bad, chosen = jax.device_get(self._see(params, self._batch))
    self.compiled = True
    scalars = {'nonfinite_experts': float(bad)}
    if chosen is not None and chosen.size and follow:
      if self._before is not None and self._before.shape == chosen.shape:
        scalars['router_saturation'] = saturation(self._before, chosen)
      self._before = chosen
    return scalars

  def state(self) -> dict[str, Any]:
    """What goes into the checkpoint under `probe`."""
    if self._before is None:
      return {}
    content = base64.b64encode(self._before.astype('<i2').tobytes()).decode()
    return {'probe': {'shape': list(self._before.shape), 'choices': content}}

  def restore(self, state: object) -> None:
    """Takes up what state() gave; anything else counts as nothing."""
    if not isinstance(state, Mapping):
      return
    shape, content = state.get('shape'), state.get('choices')
    if not isinstance(shape, list) or not isinstance(content, str):
      return
    try:
      flat = np.frombuffer(base64.b64decode(content, validate=True), '<i2')
    except (binascii.Error, ValueError):
      return
    sides = len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    if sides and flat.size == shape[0] * shape[1] * shape[2]:
      self._before = flat.reshape(shape).astype(np.int16)


def nonfinite_experts(params: PyTree, axes: PyTree) -> Array:
  """int32: experts with a weight that is not finite, counted in every layer."""
  names = flax.traverse_util.flatten_dict(axes)
  bad: dict[tuple, Array] = {}
  for path, leaf in flax.traverse_util.flatten_dict(params).items():
    if 'expert' in names[path]:
      inner = tuple(i for i, name in enumerate(names[path]) if name not in _STACKED)
      wrong_le = ~jnp.isfinite(leaf).all(axis=inner)
      owner = path[:-2]  # the kernels of one set of experts lie beside each other
      bad[owner] = bad[owner] | wrong_le if owner in bad else wrong_le
  return sum((jnp.sum(b, dtype=jnp.int32) for b in bad.values()), jnp.zeros((), jnp.int32))


def choices(module: nn.Module, params: PyTree, batch: Batch) -> Array:
  """int16 [router, token, k]: experts that TOKENS tokens of a batch choose, -1 where none."""
  is_router = lambda layer, method: isinstance(layer, Router) and method == '__call__'
  _, seen = module.apply(
    {'params': params},
    batch,
    train=False,
    capture_intermediates=is_router,
    mutable=['intermediates'],
  )
  routings = jax.tree.leaves(seen, is_leaf=lambda x: isinstance(x, Routing))
  found = []
  for routing in routings:
    g, t, k = routing.expert_index_gtk.shape[-3:]
    index = jnp.where(routing.slot_gtk >= 0, routing.expert_index_gtk, -1)
    apart = max(1, g * t // TOKENS)
    found.append(index.reshape(-1, g * t, k)[:, ::apart][:, :TOKENS].astype(jnp.int16))
  return jnp.concatenate(found) if found else jnp.zeros((0, 0, 0), jnp.int16)


def saturation(before: np.ndarray, now: np.ndarray) -> float:
  """Share of the choices now that were choices before, of tokens that are routed.

  OLMoE's router saturation, |E before and E now| / k, between two checkpoints of a run.

  Args:
    before, now: [router, token, k].
  """
  kept = (now[..., :, None] == before[..., None, :]).any(-1)
  routed = now >= 0
  return float(kept[routed].mean()) if routed.any() else 1.0
