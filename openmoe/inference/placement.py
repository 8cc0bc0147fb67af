"""Where parameters lie for inference, in which form, and the fingerprint that names them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from openmoe import partitioning
from openmoe.config import MeshConfig, ModelConfig
from openmoe.inference.cpu_experts import PerExpert, is_split
from openmoe.inference.int8 import is_int8
from openmoe.inference.offload import Store, is_offloaded
from openmoe.models.decoding import gives_embeddings, is_expert_kernel
from openmoe.plan import check_divisible
from openmoe.types import PyTree

TURNED_BYTES = 1 << 30  # of all copies; large experts gain little from them


def inference_mesh(
  config: ModelConfig,
  devices: Sequence[jax.Device],
  num_model_partitions: int | None = None,
  num_expert_partitions: int = 1,
) -> jax.sharding.Mesh | None:
  """The mesh of all devices, None for one device.

  Without num_model_partitions, weights are split as often as sizes allow; what is left of the
  devices takes rows of the batch.

  Raises:
    ConfigError: the devices or the model do not divide so.
  """
  if len(devices) == 1 and (num_model_partitions or 1) == 1 == num_expert_partitions:
    return None
  if num_model_partitions is None:
    sizes = (config.num_heads, config.mlp_dim, config.embed_dim, config.vocab_size)
    most = len(devices) // num_expert_partitions
    fits = [p for p in range(1, most + 1) if most % p == 0 and all(s % p == 0 for s in sizes)]
    num_model_partitions = fits[-1] if fits else 1
  mesh_config = MeshConfig(num_expert_partitions, num_model_partitions)
  mesh = partitioning.make_mesh(mesh_config, devices)
  check_divisible(config, mesh)
  return mesh


def expert_form(
  config: ModelConfig,
  mesh: jax.sharding.Mesh | None,
  capacity: bool,
  weights: str = 'float',
  store: Store | None = None,
) -> Callable[[str, jax.Array], Any] | None:
  """Form of experts' kernels for decoding.unstack here: an array for every expert on CPUs.

  Args:
    weights: see int8.WEIGHTS.
    store: where the kernels are outside the device.
  """
  if store is not None:
    return lambda path, stack: store.add(stack, np.dtype(jnp.dtype(config.dtype)))
  if weights != 'float':
    return None  # int8 is made of stacks
  whole = mesh is None or mesh.shape[partitioning.EXPERT] == 1
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if device.platform != 'cpu' or not whole or capacity:
    return None

  def split(path: str, stack: jax.Array) -> PerExpert:
    # By index: iterating refuses an array of several processes.
    arrays = tuple(stack[expert] for expert in range(stack.shape[0]))
    return PerExpert(arrays, sums=gives_embeddings(path, config))

  return split


def turn_experts(params: PyTree) -> PyTree:
  """Turns all experts of every kernel as well, if they are split and the copies stay small.

  Args:
    params: as decoding.unstack gives them, of one device.
  """
  leaves = jax.tree.leaves(params, is_leaf=is_split)
  if sum(x.nbytes for leaf in leaves if is_split(leaf) for x in leaf.arrays) > TURNED_BYTES:
    return params
  return jax.tree.map(lambda x: x.turn() if is_split(x) else x, params, is_leaf=is_split)


def cast(params: PyTree, config: ModelConfig) -> PyTree:
  """Kernels of the layers in the dtype in which the layers use them; the rest stays float32.

  Router, norms, embedding and output layer are used in float32 by training as well.
  """
  dtype = jnp.dtype(config.dtype)

  def one(path, x):
    if is_int8(x) or is_offloaded(x):
      return x
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    narrow = names[0].startswith('layer_') and 'router' not in names and x.ndim > 1
    return x.astype(dtype) if narrow and x.dtype != dtype else x

  return jax.tree_util.tree_map_with_path(
    one, params, is_leaf=lambda x: is_int8(x) or is_offloaded(x)
  )


def _chosen(config: Any) -> dict[str, Any]:
  """The fields of a configuration that are not at their default, by name."""
  found = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value != field.default:
      found[field.name] = _chosen(value) if dataclasses.is_dataclass(value) else repr(value)
  return found


def config_digest(config: ModelConfig) -> str:
  """Tells configurations apart; a field that is new and at its default changes nothing."""
  return hashlib.sha256(json.dumps(_chosen(config), sort_keys=True).encode()).hexdigest()


def fingerprint(config: ModelConfig, params: PyTree) -> str:
  """sha256 of configuration and parameters; experts that are split count as their stack does."""
  digest = hashlib.sha256(config_digest(config).encode())
  pieces: list[tuple[str, int, jax.Array]] = []
  for path, leaf in flax.traverse_util.flatten_dict(params, sep='/').items():
    if is_int8(leaf):
      pieces += [(f'{path} {part}', 0, getattr(leaf, part)) for part in ('values', 'scale')]
    elif is_offloaded(leaf):
      pieces += [(path, e, x) for e, x in enumerate(leaf.pieces())]
    elif is_split(leaf):
      pieces += [(path, e, x) for e, x in enumerate(leaf.arrays)]
    elif is_expert_kernel(path, config):
      pieces += [(path, e, leaf[e]) for e in range(leaf.shape[0])]
    else:
      pieces.append((path, 0, leaf))
  for path, expert, leaf in sorted(pieces, key=lambda piece: piece[:2]):
    digest.update(f'{path} {expert} {leaf.shape} {leaf.dtype}'.encode())
    digest.update(np.ascontiguousarray(_fetched(leaf)))
  return digest.hexdigest()


def _fetched(x: jax.Array | np.ndarray) -> np.ndarray:
  """The whole array, also where other processes hold parts of it."""
  if isinstance(x, np.ndarray) or x.is_fully_addressable:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
