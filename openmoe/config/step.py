"""What shapes a training step: model, optimizer, mesh; and the checks of all configurations.

Every error names the value, the rule it breaks and the remedy. A config that constructs is
consistent in itself; what depends on the devices is checked in plan.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import typing
from collections.abc import Sequence


class ConfigError(ValueError):
  """A configuration that cannot be run, refused before anything is compiled."""

  exit_code = 64  # EX_USAGE, as openmoe.observe.command has them


class Dispatch(enum.Enum):
  """How tokens reach their experts. All agree to rounding where nothing is dropped."""

  MASK = 'mask'  # one-hot einsums, the reference of the released models
  SCATTER = 'scatter'  # index based; the same slots and drops, gather-only gradients
  DROPLESS = 'dropless'  # sorted by expert, grouped matmuls; capacity is ignored


class CapacityConvention(enum.Enum):
  """How many slots an expert reserves for a routing group of T tokens."""

  RELEASED = 'released'  # round(factor * T / E): the factor does not include top_k
  WITH_TOP_K = 'with_top_k'  # round(factor * top_k * T / E)
  COLOSSALAI = 'colossalai'  # floor of the same, made even: the published PyTorch port


class RouterOrder(enum.Enum):
  """What the combine weights are."""

  SOFTMAX_TOP_K = 'softmax_top_k'  # raw probabilities of the chosen experts (OpenMoE)
  TOP_K_SOFTMAX = 'top_k_softmax'  # softmax over the chosen logits only (JetMoE)


class RouterLoss(enum.Enum):
  """How the losses of all routers become one number."""

  MEAN = 'mean'  # mean over sparse layers; load balance is top_k at balance (OpenMoE)
  SUM = 'sum'  # sum over all routers; load balance is 1 per router at balance (JetMoE)


BALANCE_LOSSES = ('st_moe', 'switch', 'gshard', 'mixtral', 'megablocks', 'jetmoe', 'olmo_core')
BALANCE_LOSSES += ('deepseek_sequence', 'loss_free')  # see layers/moe/balance.py


class Architecture(enum.Enum):
  """Which decoder the sizes are of."""

  OPENMOE = 'openmoe'  # dense and sparse blocks; OpenLLaMA is the one without sparse blocks
  JETMOE = 'jetmoe'  # every block a mixture of attention heads and a mixture of MLPs


class Remat(enum.Enum):
  """What a block recomputes in the backward pass."""

  NONE = 'none'  # keep every activation
  DOTS = 'dots'  # keep matmul outputs without a batch of their own, recompute the rest
  FULL = 'full'  # keep only the block's input


class Schedule(enum.Enum):
  CONSTANT = 'constant'
  RSQRT = 'rsqrt'  # base / sqrt(max(step, warmup)): flat, then decaying; no linear part
  LINEAR_WARMUP = 'linear_warmup'  # linear to base over the warm-up, then constant
  COSINE = 'cosine'  # linear warm-up, cosine to final_fraction * base at total_steps
  WSD = 'wsd'  # linear warm-up, stable, exponential decay over the last decay_steps


class OptimizerName(enum.Enum):
  ADAFACTOR = 'adafactor'
  ADAMW = 'adamw'


def parse_enum(kind: type[enum.Enum], value: object, field: str):
  """`value` as a member of `kind`; accepts a member or its string value.

  Raises:
    ConfigError: naming the nearest valid value.
  """
  if isinstance(value, kind):
    return value
  names = [member.value for member in kind]
  if value in names:
    return kind(value)
  near = difflib.get_close_matches(str(value), names, n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  raise ConfigError(f'{field}={value!r} is not one of {names}.{hint}')


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def check_fields(obj: object, zero: Sequence[str] = (), shares: Sequence[str] = ()) -> None:
  """Checks every field of a configuration by its annotation, and widens text to enums.

  An int is a whole number of at least 1 (4.0, 1e2 and True are none), a float a finite number
  above 0, a bool True or False (text would count as True), an enum a member or its value.

  Args:
    zero: numbers that may be 0.
    shares: floats that are in [0, 1).

  Raises:
    ConfigError: naming the field, its value and the rule.
  """
  for name, kind in typing.get_type_hints(type(obj)).items():
    value, label, near = getattr(obj, name), f'{type(obj).__name__}.{name}', ''
    if type(None) in typing.get_args(kind):
      if value is None:
        continue
      kind = typing.get_args(kind)[0]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = is_number and abs(value) < math.inf  # NaN is not
    if isinstance(kind, enum.EnumType):
      object.__setattr__(obj, name, parse_enum(kind, value, label))
      continue
    if kind is bool:
      right, rule = isinstance(value, bool), 'True or False'
    elif kind is int:
      least = 0 if name in zero else 1
      right = finite and isinstance(value, int) and value >= least
      rule = f'a whole number of at least {least}'
      near = f'; write {int(value)}' if finite and least <= value == int(value) else ''
    elif kind is float and name in shares:
      right, rule = finite and 0 <= value < 1, 'in [0, 1)'
    elif kind is float and name in zero:
      right, rule = finite and value >= 0, 'a number of at least 0'
    elif kind is float:
      right, rule = finite and value > 0, 'a positive number'
    else:
      continue
    require(right, f'{label}={value!r} must be {rule}{near}.')


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """The sparse layer: routing, capacity, dispatch and its losses' weights.

  Attributes:
    num_experts: experts per sparse layer (E).
    top_k: experts per token.
    group_size: tokens that compete for the same slots; groups are contiguous runs of the
      flattened (row, position) tokens. See plan.upstream_group_size for the value the original
      system would have taken from its device count.
    capacity_factor, eval_capacity_factor: slots per token and expert, see expert_capacity.
    min_expert_capacity: lower bound of the slots.
    capacity_convention: whether the factor counts top_k.
    router_order: which softmax scales the expert outputs.
    load_balance_weight, router_z_weight: weights of the two router losses.
    router_loss: how the losses of several routers are put together.
    balance_loss: which formula load balance has; one of BALANCE_LOSSES.
    router_init_std: standard deviation of the router's initial kernel.
    jitter_noise: multiplies router inputs by U(1-j, 1+j) in training; 0 is off.
    ignore_padding: False routes padding (to experts 0 and 1: its logits tie), as released.
    dispatch: how tokens reach the experts.
  """

  num_experts: int
  top_k: int = 2
  group_size: int = 4096
  capacity_factor: float = 1.25
  eval_capacity_factor: float = 2.0
  min_expert_capacity: int = 4
  capacity_convention: CapacityConvention = CapacityConvention.RELEASED
  router_order: RouterOrder = RouterOrder.SOFTMAX_TOP_K
  load_balance_weight: float = 0.01
  router_z_weight: float = 1e-4
  router_loss: RouterLoss = RouterLoss.MEAN
  router_init_std: float = 0.02
  jitter_noise: float = 0.0
  ignore_padding: bool = False
  dispatch: Dispatch = Dispatch.SCATTER
  balance_loss: str = 'st_moe'

  def __post_init__(self):
    check_fields(self, zero=('load_balance_weight', 'router_z_weight'), shares=('jitter_noise',))
    rule = f'MoEConfig.balance_loss={self.balance_loss!r} is not one of {BALANCE_LOSSES}.'
    require(self.balance_loss in BALANCE_LOSSES, rule)
    require(
      self.top_k <= self.num_experts,
      f'MoEConfig.top_k={self.top_k} is more than num_experts={self.num_experts}; lower top_k.',
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """An OpenMoE, OpenLLaMA or JetMoE decoder.

  Attributes:
    name: label for logs and checkpoints.
    architecture: which decoder; the fields below say where it matters.
    vocab_size: rows of the embedding and of the output layer.
    num_layers, embed_dim, mlp_dim, num_heads, head_dim: sizes; num_heads * head_dim need not be
      embed_dim. JetMoE: num_heads are the key-value heads, which each of a token's top_k
      attention experts meets with as many query heads of its own.
    num_sparse_layers: 0 for a dense model; else num_layers must be a multiple, and layer i is
      sparse iff i % p == p - 1 with p = num_layers / num_sparse_layers. JetMoE: num_layers.
    moe: the sparse layers; required iff num_sparse_layers > 0. JetMoE: of both its mixtures.
    dtype: of activations ('bfloat16' or 'float32'); parameters are float32. 'float64' is for
      comparing implementations, under jax.enable_x64 and with float64 parameters.
    dropout_rate: of every dropout of the network.
    init_scale: OpenMoE, OpenLLaMA: SCALE of the variance-scaling initialisers of every matrix (0.1
      for the MoE models, 1.0 dense). JetMoE does not read it.
    init_std: JetMoE: standard deviation of every matrix. The other two read it for the head of a
      classifier alone.
    rope_theta, norm_epsilon: as named.
    final_norm_epsilon: of the norm after the last block; None takes norm_epsilon. The published
      JetMoE has 1e-6 inside and 1e-5 at the end.
    float32_attention: computes attention logits and softmax in float32 (released: False).
    remat: what blocks recompute in the backward pass.
    vocab_block: columns of the output layer held at once by the loss.
    logit_z_weight: weight of the token loss's logsumexp^2.
  """

  name: str
  vocab_size: int
  num_layers: int
  embed_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  num_sparse_layers: int = 0
  moe: MoEConfig | None = None
  dtype: str = 'bfloat16'
  dropout_rate: float = 0.0
  init_scale: float = 0.1
  init_std: float = 0.01
  rope_theta: float = 10000.0
  norm_epsilon: float = 1e-6
  final_norm_epsilon: float | None = None
  float32_attention: bool = False
  remat: Remat = Remat.NONE
  vocab_block: int = 16384
  logit_z_weight: float = 1e-4
  architecture: Architecture = Architecture.OPENMOE

  def __post_init__(self):
    check_fields(self, zero=('num_sparse_layers', 'logit_z_weight'), shares=('dropout_rate',))
    require(self.head_dim % 2 == 0, f'head_dim={self.head_dim} must be even for rotary halves.')
    require(
      self.dtype in ('bfloat16', 'float32', 'float64'),
      f"ModelConfig.dtype={self.dtype!r} must be 'bfloat16' or 'float32'.",
    )
    require(
      (self.num_sparse_layers > 0) == (self.moe is not None),
      f'num_sparse_layers={self.num_sparse_layers} with moe={self.moe}: give both or neither.',
    )
    if self.num_sparse_layers:
      require(
        self.num_layers % self.num_sparse_layers == 0,
        f'num_layers={self.num_layers} must be a multiple of num_sparse_layers='
        f'{self.num_sparse_layers}; sparse layers are evenly spaced.',
      )
    require(
      self.architecture is not Architecture.JETMOE or self.num_sparse_layers == self.num_layers,
      f'num_sparse_layers={self.num_sparse_layers} of num_layers={self.num_layers}: every block of '
      f'JetMoE is sparse, so give both the same number (a dense one has num_experts=1).',
    )

  @property
  def last_norm_epsilon(self) -> float:
    """Epsilon of the norm after the last block."""
    given = self.final_norm_epsilon
    return self.norm_epsilon if given is None else given

  @property
  def sparse_period(self) -> int:
    """Layers per repeating group of blocks; the last of each group is sparse."""
    return self.num_layers // self.num_sparse_layers if self.num_sparse_layers else 1

  @property
  def sparse_layers(self) -> tuple[int, ...]:
    """0-based indices of the sparse layers."""
    if not self.num_sparse_layers:
      return ()
    return tuple(range(self.sparse_period - 1, self.num_layers, self.sparse_period))

  @property
  def router_layers(self) -> tuple[int, ...]:
    """0-based layer of each router, in the order of RouterStats' leading axis."""
    routers = 2 if self.architecture is Architecture.JETMOE else 1
    return tuple(layer for layer in self.sparse_layers for _ in range(routers))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Optimizer and schedule.

  Attributes:
    name: adafactor (as t5x defines it) or adamw.
    schedule, learning_rate: see Schedule; learning_rate is its base.
    warmup_steps: as the schedule uses it.
    decay_steps: WSD: length of the final decay.
    final_fraction: COSINE and WSD: learning rate at the end, as a share of the base.
    clip_global_norm: None for no clipping.
    decay_rate: Adafactor: second moments decay as 1 - t^-decay_rate.
    min_dim_size_to_factor: Adafactor: matrices with a smaller side are not factored.
    b1, b2, eps, weight_decay: AdamW.
  """

  name: OptimizerName = OptimizerName.ADAFACTOR
  schedule: Schedule = Schedule.RSQRT
  learning_rate: float = 1.0
  warmup_steps: int = 10000
  decay_steps: int = 0
  final_fraction: float = 0.1
  clip_global_norm: float | None = None
  decay_rate: float = 0.8
  min_dim_size_to_factor: int = 128
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1

  def __post_init__(self):
    zero = ('warmup_steps', 'decay_steps', 'final_fraction', 'eps', 'weight_decay')
    check_fields(self, zero, shares=('b1', 'b2'))
    require(
      self.schedule is not Schedule.RSQRT or self.warmup_steps > 0,
      'The rsqrt schedule needs warmup_steps > 0: it is base / sqrt(max(step, warmup_steps)).',
    )
    require(
      self.schedule is not Schedule.WSD or (self.decay_steps > 0 and self.final_fraction > 0),
      f'WSD needs decay_steps > 0 and final_fraction > 0, not {self.decay_steps} and '
      f'{self.final_fraction}: the decay is exponential.',
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How devices are arranged as (data, expert, model); data takes what is left.

  Attributes:
    num_expert_partitions: size of the expert axis; divides num_experts.
    num_model_partitions: size of the model axis (tensor parallelism).
    fsdp: also shard weights and optimizer state over the data axis.
  """

  num_expert_partitions: int = 1
  num_model_partitions: int = 1
  fsdp: bool = False

  def __post_init__(self):
    check_fields(self)
