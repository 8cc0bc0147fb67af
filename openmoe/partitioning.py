"""The mesh, and the one table that maps logical axes to mesh axes.

Model code names logical axes and is otherwise single-device code; only this file knows that the
mesh is (data, expert, model). A computation sees the mesh that `jax.set_mesh` has put in place;
with none in place every function here is the identity, so a layer runs alone in a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from openmoe import slices
from openmoe.config import ConfigError, MeshConfig
from openmoe.types import Array, PyTree

DATA, EXPERT, MODEL = 'data', 'expert', 'model'
MESH_AXES = (DATA, EXPERT, MODEL)

# Logical axis -> mesh axes it is split over. Weights first, then activations (act_*).
RULES: dict[str, tuple[str, ...]] = {
  'vocab': (MODEL,),
  'embed': (),
  'heads': (MODEL,),
  'mlp': (MODEL,),
  'gate': (),  # the two halves of a double-width gate
  'expert': (EXPERT,),
  'expert_mlp': (MODEL,),
  'router': (),  # the expert axis of the router kernel: every device scores every expert
  'classes': (),  # of a sequence classifier
  'groups': (),  # scanned repetitions of a group of blocks
  'layers': (),  # scanned dense blocks inside a group
  'act_batch': (DATA, EXPERT),
  'act_length': (),
  'act_embed': (),
  'act_embed_slice': (MODEL,),  # inside the expert exchange every model shard moves its slice
  'act_heads': (MODEL,),
  'act_mlp': (MODEL,),
  'act_group': (DATA, EXPERT),
}

# FSDP is a one-row change: weights and optimizer state are also split over data.
FSDP_OVERLAY: dict[str, tuple[str, ...]] = {'embed': (DATA,)}


def axis_rules(fsdp: bool = False) -> dict[str, tuple[str, ...]]:
  """The table for parameters and optimizer state."""
  return RULES | FSDP_OVERLAY if fsdp else RULES


def logical_to_spec(
  axes: Sequence[str | None], rules: dict[str, tuple[str, ...]] | None = None
) -> PartitionSpec:
  """PartitionSpec of an array whose dimensions carry these logical axes (None: not split).

  Raises:
    ConfigError: an axis is not in the table, or two dimensions claim the same mesh axis.
  """
  rules = RULES if rules is None else rules
  used: dict[str, str] = {}
  entries = []
  for axis in axes:
    if axis is None:
      entries.append(None)
      continue
    if axis not in rules:
      raise ConfigError(f'Logical axis {axis!r} has no row in partitioning.RULES: {sorted(rules)}.')
    for mesh_axis in rules[axis]:
      if mesh_axis in used:
        raise ConfigError(
          f'Axes {tuple(axes)}: {used[mesh_axis]!r} and {axis!r} both map to mesh axis '
          f'{mesh_axis!r}, which can split only one dimension of an array.'
        )
      used[mesh_axis] = axis
    names = rules[axis]
    entries.append(names if len(names) > 1 else names[0] if names else None)
  return PartitionSpec(*entries)


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, int, int]:
  """(data, expert, model) sizes for this many devices; data takes what is left.

  Raises:
    ConfigError: the partitions do not divide the number of devices.
  """
  expert, model = config.num_expert_partitions, config.num_model_partitions
  if device_count % (expert * model):
    fitting = [e for e in range(expert, 0, -1) if device_count % (e * model) == 0]
    near = f' It is no upper bound, as in t5x; here {fitting[0]} fits.' if fitting else ''
    raise ConfigError(
      f'{device_count} devices cannot be split into NUM_EXPERT_PARTITIONS={expert} x '
      f'NUM_MODEL_PARTITIONS={model} = {expert * model}: the product must divide the devices.{near}'
    )
  return device_count // (expert * model), expert, model


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Arranges the devices (default: all) as (data, expert, model)."""
  devices = jax.devices() if devices is None else devices
  shape, types = mesh_shape(config, len(devices)), (AxisType.Auto,) * 3
  try:
    if len({getattr(d, 'slice_index', None) for d in devices}) == 1:
      return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
  except NotImplementedError:
    pass  # axes that do not fit the torus
  return jax.sharding.Mesh(slices.arranged(shape, devices), MESH_AXES, axis_types=types)


def current_mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh set by jax.set_mesh, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def without_mesh():
  """Context in which layers run unsharded: parameter initialisers are traced on a toy batch."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def shard(x: Array, axes: Sequence[str | None]) -> Array:
  """Constrains an activation to the layout its logical axes imply."""
  if current_mesh() is None:
    return x
  if len(axes) != x.ndim:
    raise ValueError(f'{len(axes)} axes {tuple(axes)} for an array of shape {x.shape}.')
  return jax.lax.with_sharding_constraint(x, logical_to_spec(axes))


def mesh_axes(logical: str) -> tuple[str, ...]:
  """Mesh axes that split a logical axis here; () without a mesh."""
  return () if current_mesh() is None else RULES[logical]


def partitions(logical: str) -> int:
  """Into how many pieces a logical axis is split here."""
  mesh = current_mesh()
  return 1 if mesh is None else math.prod(mesh.shape[a] for a in RULES[logical])


def local_shape(shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...]:
  """Shape of one device's piece of an array with these logical axes."""
  pairs = zip(shape, axes, strict=True)
  return tuple(size if axis is None else size // partitions(axis) for size, axis in pairs)


def target() -> tuple[str, str]:
  """(platform, kind) of the devices that a program is made for, as ('tpu', 'TPU v4').

  Those of the mesh, which need not be here; without a mesh, this process's own.
  """
  mesh = current_mesh()
  device = None if mesh is None else mesh.abstract_device
  if device is None:
    device = jax.devices()[0]
  return device.platform, device.device_kind


def per_shard(
  fn: Callable, in_axes: Sequence[PyTree], out_axes: PyTree, *args: PyTree, typed: bool = True
) -> PyTree:
  """Runs `fn` once per device on the local pieces of `args`; without a mesh, just `fn(*args)`.

  Axes are tuples of logical names, one a dimension, in pytrees shaped like the arguments. What fn
  returns must be summed over every mesh axis that its out_axes do not name; fn communicates with
  `all_reduce`, `exchange`, `gather` and `reduce_scatter` below.

  typed=False is for fn that call Pallas kernels which do not say how their outputs differ between
  devices: values then carry no manual-axis types. out_axes must name every mesh axis, and fn must
  not use all_reduce: its gradient would be summed twice.
  """
  if current_mesh() is None:
    return fn(*args)
  is_axes = lambda a: isinstance(a, tuple) and all(x is None or isinstance(x, str) for x in a)
  specs = partial(jax.tree.map, logical_to_spec, is_leaf=is_axes)
  mapped = jax.shard_map(
    fn, in_specs=specs(tuple(in_axes)), out_specs=specs(out_axes), check_vma=typed
  )
  return mapped(*args)


def varying(x: Array) -> Array:
  """Inside per_shard: marks a value (a loop's initial zeros, say) as differing between devices.

  The transpose of the cast sums: the gradient of a weight that devices share is added up over
  them where the weight was cast.
  """
  if current_mesh() is None:
    return x
  missing = tuple(a for a in MESH_AXES if a not in jax.typeof(x).mat.varying)
  return jax.lax.pcast(x, missing, to='varying') if missing else x


def all_reduce(x: Array, logical: str) -> Array:
  """Inside per_shard: sums over the devices that split a logical axis."""
  axes = mesh_axes(logical)
  return jax.lax.psum(x, axes) if axes else x


def all_max(x: Array, logical: str) -> Array:
  """Inside per_shard: elementwise maximum over the devices that split a logical axis."""
  axes = mesh_axes(logical)
  return jax.lax.pmax(x, axes) if axes else x


def shard_index(logical: str) -> Array | int:
  """Inside per_shard: which piece of a logical axis this device holds."""
  axes = mesh_axes(logical)
  return jax.lax.axis_index(axes) if axes else 0


def _split_axes(logical: str) -> list[str]:
  """Mesh axes that really split a logical axis; collectives over one device are left out."""
  return [axis for axis in mesh_axes(logical) if current_mesh().shape[axis] > 1]


def gather(x: Array, logical: str, dim: int) -> Array:
  """Inside per_shard: puts the pieces of a dimension together on every device."""
  for axis in _split_axes(logical):
    x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
  return x


def reduce_scatter(x: Array, logical: str, dim: int) -> Array:
  """Inside per_shard: sums over the devices, each keeping its piece of a dimension."""
  for axis in _split_axes(logical):
    x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
  return x


def exchange(x: Array, logical: str, split_dim: int, concat_dim: int) -> Array:
  """Inside per_shard: all-to-all; splits one dimension over the devices, joins another."""
  for axis in _split_axes(logical):
    x = jax.lax.all_to_all(x, axis, split_axis=split_dim, concat_axis=concat_dim, tiled=True)
  return x


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows over data x expert; the layout of every [b, t] field of a Batch."""
  return NamedSharding(mesh, logical_to_spec(('act_batch', 'act_length')))
