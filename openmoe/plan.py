"""What a run will cost and whether it fits its mesh, known before anything is allocated."""

from __future__ import annotations

import dataclasses
import math

import flax.traverse_util
import jax
import optax

from openmoe import partitioning
from openmoe.config import (
  Architecture,
  CapacityConvention,
  ConfigError,
  DataConfig,
  Dispatch,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)
from openmoe.models import abstract_params
from openmoe.optimizer import learning_rate
from openmoe.programme import Programme, check_optimizers
from openmoe.train_step import abstract_state, state_shardings
from openmoe.types import PyTree


def check(
  run: TrainConfig,
  model: ModelConfig,
  optimizer: OptimizerConfig,
  programme: Programme,
  eval_data: DataConfig | None,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  fsdp: bool = False,
) -> None:
  """Refuses what a mesh cannot run, in any stage.

  Raises:
    ConfigError: with the numbers, the rule and the remedy.
  """
  check_divisible(model, mesh, fsdp)
  check_optimizers(programme, optimizer)
  for stage in programme.stages:
    check_batch(model, stage.data, run.num_microbatches, mesh)
  if eval_data is not None and run.eval_period:
    check_batch(model, eval_data, 1, mesh)


def check_divisible(
  model: ModelConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, fsdp: bool = False
) -> None:
  """Refuses sizes that the mesh cannot split evenly.

  Raises:
    ConfigError: with the size, the mesh axis and what would fit.
  """
  parts = {axis: mesh.shape[axis] for axis in partitioning.MESH_AXES}
  model_parts = ('NUM_MODEL_PARTITIONS', parts[partitioning.MODEL])
  splits = [(name, *model_parts) for name in ('vocab_size', 'num_heads', 'mlp_dim', 'embed_dim')]
  if fsdp:
    splits.append(('embed_dim', 'the data partitions of FSDP', parts[partitioning.DATA]))
  for name, what, count in splits:
    size = getattr(model, name)
    if size % count:
      fits = [p for p in range(1, count + 1) if size % p == 0]
      raise ConfigError(
        f'{name}={size} does not divide by {what}={count}; choose one of {fits}'
        + (', or leave FSDP off.' if 'FSDP' in what else '.')
      )
  experts, expert_parts = model.moe.num_experts if model.moe else 0, parts[partitioning.EXPERT]
  if experts % expert_parts:
    raise ConfigError(
      f'num_experts={experts} does not divide by NUM_EXPERT_PARTITIONS={expert_parts}; '
      f'choose one of {[p for p in range(1, experts + 1) if experts % p == 0]}.'
    )


def check_batch(
  model: ModelConfig,
  data: DataConfig,
  num_microbatches: int,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> None:
  """Refuses batches that cannot be cut into microbatches, device rows and routing groups.

  Raises:
    ConfigError: with the numbers, the rule and the nearest batch or group size that fits.
  """
  shards = mesh.shape[partitioning.DATA] * mesh.shape[partitioning.EXPERT]
  unit = shards * num_microbatches
  if data.batch_size % unit:
    raise ConfigError(
      f'batch_size={data.batch_size} must be a multiple of data x expert partitions ({shards}) x '
      f'num_microbatches ({num_microbatches}) = {unit}; the next that fits is '
      f'{-(-data.batch_size // unit) * unit}.'
    )
  if model.moe is None:
    return
  tokens_per_shard = data.batch_size // unit * data.row_length
  size = model.moe.group_size
  if tokens_per_shard % size:
    fits = [n for n in range(1, tokens_per_shard + 1) if tokens_per_shard % n == 0]
    nearest = min(fits, key=lambda n: abs(n - size))
    raise ConfigError(
      f'group_size={size} does not divide the {tokens_per_shard} tokens that each of the {shards} '
      f'data x expert partitions holds in one microbatch; the nearest that fits is {nearest}.'
    )


def upstream_group_size(
  num_tokens: int,
  max_group_size: int,
  num_experts: int,
  *,
  device_count: int,
  num_expert_partitions: int,
  num_model_partitions: int,
) -> int:
  """The group size that the original system takes on a given topology.

  There the number of groups is a multiple of (expert replicas x experts), so results depend on
  the devices; here group_size is explicit, and this function translates (flaxformer
  moe_layers.py, `_num_groups`). num_tokens is that of the whole global microbatch.

  Raises:
    ConfigError: no number of groups divides the tokens (the original pads there).

  >>> upstream_group_size(128 * 2048, 4096, 32, device_count=512,
  ...                     num_expert_partitions=32, num_model_partitions=8)
  4096
  """
  replicas = max(1, device_count // (num_expert_partitions * num_model_partitions))
  unit = replicas * num_experts
  if num_tokens % unit:
    raise ConfigError(
      f'{num_tokens} tokens do not divide into multiples of {replicas} replicas x {num_experts} '
      f'experts = {unit} groups; the original would pad to {-(-num_tokens // unit) * unit}.'
    )
  groups = max(num_tokens // max_group_size, unit)
  while num_tokens % groups or groups % unit:
    groups += 1
  return num_tokens // groups


def programme_rate(
  programme: Programme, config: OptimizerConfig, total_steps: int
) -> optax.Schedule:
  """Global step -> learning rate over all stages.

  A stage with a schedule of its own counts from its first step, over its own steps; the others
  follow the run's schedule by the global step.
  """
  starts = programme.starts()
  whole = learning_rate(config, total_steps)

  def of_stage(stage, start):
    if stage.optimizer is None:
      return lambda inside: whole(inside + start)
    return learning_rate(stage.optimizer, stage.steps)

  schedules = [of_stage(s, start) for s, start in zip(programme.stages, starts, strict=True)]
  return optax.join_schedules(schedules, starts[1:])


def flops_per_token(config: ModelConfig, length: int) -> float:
  """Model FLOPs of one training token: forward and backward (three times the forward).

  Matrix products only. Attention counts the causal half; experts count the top_k a token is sent
  to, without capacity padding, dispatch or recomputation.
  """
  if config.architecture is Architecture.JETMOE:
    return 3.0 * _jetmoe_forward_flops(config, length)
  d, width = config.embed_dim, config.num_heads * config.head_dim
  attention = 2 * 4 * d * width + 2 * 2 * (length / 2) * width
  mlp = 2 * 4 * d * config.mlp_dim  # double gate, linear, output
  dense = config.num_layers - config.num_sparse_layers
  forward = config.num_layers * attention + dense * mlp + 2 * d * config.vocab_size
  if config.moe:
    sparse = (config.moe.top_k + 1) * mlp + 2 * d * config.moe.num_experts
    forward += config.num_sparse_layers * sparse
  return 3.0 * forward


def flops_before(config: ModelConfig, programme: Programme, step: int) -> float:
  """Model FLOPs of all batches before global step `step` of a programme."""
  done = 0.0
  for stage in programme.stages:
    steps = min(step, stage.steps)
    done += steps * stage.tokens_per_step * flops_per_token(config, stage.data.row_length)
    step -= steps
  return done


def _jetmoe_forward_flops(config: ModelConfig, length: int) -> float:
  """Forward FLOPs of a token: top_k query and output projections, top_k heads a key-value head."""
  d, k, width = config.embed_dim, config.moe.top_k, config.num_heads * config.head_dim
  attention = 2 * (2 * k + 2) * d * width + k * 2 * 2 * (length / 2) * width
  mlp = 2 * k * 3 * d * config.mlp_dim
  routers = 2 * 2 * d * config.moe.num_experts
  return config.num_layers * (attention + mlp + routers) + 2 * d * config.vocab_size


@dataclasses.dataclass(frozen=True)
class ParameterRow:
  """One parameter on the mesh: path, shape, logical axes, PartitionSpec, bytes per device."""

  path: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  spec: str
  device_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Counts are of parameters; bytes are per device.

  Attributes:
    total_params, active_params: active is per token, blocks only.
    rows: every parameter.
    params_bytes, optimizer_bytes, gradients_bytes: float32 state and accumulated gradients.
    flops_per_step: model FLOPs of one global batch.
    capacity_note: how many assignments the expert capacity can serve, '' for dropless or dense.
  """

  total_params: int
  active_params: int
  rows: tuple[ParameterRow, ...]
  params_bytes: int
  optimizer_bytes: int
  gradients_bytes: int
  flops_per_step: float
  capacity_note: str


def _device_bytes(leaf, sharding: jax.sharding.NamedSharding) -> int:
  return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def tree_bytes(tree: PyTree, shardings: PyTree) -> int:
  """Bytes of one device for arrays laid out so."""
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
  return sum(_device_bytes(leaf, sharding) for leaf, sharding in pairs)


def make_plan(
  model: ModelConfig,
  optimizer: OptimizerConfig,
  mesh_config: MeshConfig,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  batch_size: int,
  length: int,
) -> Plan:
  """Shapes the whole state on a mesh, which may be abstract: no devices are needed."""
  abstract, axes = abstract_state(model, optimizer)
  shardings = state_shardings(mesh, optimizer, abstract, axes, mesh_config.fsdp)
  flat = lambda tree: flax.traverse_util.flatten_dict(tree, sep='/')
  leaves, names, places = flat(abstract.params), flat(axes), flat(shardings.params)
  rows = tuple(
    ParameterRow(
      path,
      leaf.shape,
      names[path],
      str(places[path].spec).removeprefix('PartitionSpec'),
      _device_bytes(leaf, places[path]),
    )
    for path, leaf in leaves.items()
  )
  params_bytes = sum(row.device_bytes for row in rows)
  return Plan(
    total_params=count_params(abstract.params),
    active_params=active_params(model),
    rows=rows,
    params_bytes=params_bytes,
    optimizer_bytes=tree_bytes(abstract.opt_state, shardings.opt_state),
    gradients_bytes=params_bytes,
    flops_per_step=flops_per_token(model, length) * batch_size * length,
    capacity_note=_capacity_note(model),
  )


def _capacity_note(model: ModelConfig) -> str:
  moe = model.moe
  if moe is None or moe.dispatch is Dispatch.DROPLESS:
    return ''
  share = moe.capacity_factor
  if moe.capacity_convention is CapacityConvention.RELEASED:
    share /= moe.top_k
  return (
    f'capacity factor {moe.capacity_factor} ({moe.capacity_convention.value}): '
    f'room for {min(share, 1.0):.1%} of the (token, choice) pairs at most'
  )


def abstract_mesh(config: MeshConfig, device_count: int) -> jax.sharding.AbstractMesh:
  """The mesh of a machine that is not here.

  Raises:
    ConfigError: the partitions do not divide the devices.
  """
  shape = partitioning.mesh_shape(config, device_count)
  return jax.sharding.AbstractMesh(
    shape, partitioning.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
  )


def count_params(tree: PyTree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def active_params(config: ModelConfig) -> int:
  """Parameters a token goes through in the blocks: all but the experts it is not sent to.

  Embedding and output layer are not counted (the convention of the paper's "activated").
  """
  shapes, axes = abstract_params(config)
  blocks = jax.tree.leaves(shapes['decoder'])
  names = jax.tree.leaves(axes['decoder'], is_leaf=lambda a: isinstance(a, tuple))
  total = count_params(shapes['decoder_norm'])
  for leaf, axis in zip(blocks, names, strict=True):
    size = math.prod(leaf.shape)
    total += size * config.moe.top_k // config.moe.num_experts if 'expert' in axis else size
  return total
