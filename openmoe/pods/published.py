"""Published runs that our layers can express, to hold predictions against.

Sizes, rows a device and utilisation: MaxText's src/maxtext/configs/tpu/v5e and v5p (README.md and
the scripts beside it), docs/reference/models/tiering.md and benchmarks/
maxtext_trillium_model_configs.py; tpu-recipes' training/v5p/Mixtral-8X7B-Maxtext.

What differs from them, in all: our gated MLP has four matrices where theirs has three, so its width
is three quarters of theirs and products and parameters are the same; every head has keys and values
of its own; attention has no fused kernel; parameters are float32. A Mixtral layer sends each token
to two of eight MLPs, ours to one of eight and to one that all share. Rows that attention's logits
leave no room for go through in microbatches.
"""

from __future__ import annotations

import dataclasses

from openmoe.config import (
  CapacityConvention,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  OptimizerName,
  Remat,
  Schedule,
)
from openmoe.pods.request import Effort, Request
from openmoe.pods.target import Target

_ADAMW = OptimizerConfig(
  OptimizerName.ADAMW, Schedule.CONSTANT, learning_rate=1e-4, clip_global_norm=1.0
)


@dataclasses.dataclass(frozen=True)
class Published:
  """One published run.

  Attributes:
    name: of it.
    utilisation: share of the bfloat16 peak that was published.
    full_attention: whether its FLOPs count all of attention, as they did until July 2025.
    routing: of tokens to experts, '' for a dense model.
    request: our step nearest to it.
  """

  name: str
  utilisation: float
  full_attention: bool
  routing: str
  request: Request


def _dense(name: str, layers: int, embed: int, mlp: int, heads: int, **more) -> ModelConfig:
  sizes = {'vocab_size': 32000, 'num_layers': layers, 'embed_dim': embed}
  sizes |= {'mlp_dim': mlp * 3 // 4, 'num_heads': heads, 'head_dim': 128}
  return ModelConfig(name, **(sizes | {'remat': Remat.FULL} | more))


def _mixtral(capacity_factor: float) -> ModelConfig:
  moe = MoEConfig(
    8,
    top_k=1,
    capacity_factor=capacity_factor,
    capacity_convention=CapacityConvention.WITH_TOP_K,
  )
  return _dense('mixtral_8x7b', 32, 4096, 14336, 32, num_sparse_layers=32, moe=moe)


def _request(model, topology, rows, length, parts=1, microbatches=1) -> Request:
  """A step with FSDP over what tensor parallelism leaves.

  Args:
    rows: of a device.
    parts: of tensor parallelism.
  """
  target, mesh = Target(topology), MeshConfig(num_model_partitions=parts, fsdp=True)
  batch = rows * target.device_count
  return Request(model, _ADAMW, mesh, microbatches, batch, length, target, Effort.FULL)


_B16, _B32 = _dense('16b', 32, 4096, 28672, 64), _dense('32b', 32, 8192, 28672, 64)
RUNS = (
  Published('MaxText 16B', 0.6110, True, '', _request(_B16, 'v5e:16x16', 6, 2048, 1, 2)),
  Published('MaxText 32B', 0.6686, True, '', _request(_B32, 'v5e:16x16', 4, 2048, 1, 2)),
  Published('MaxText 32B', 0.7147, True, '', _request(_B32, 'v5p:4x4x4', 6, 2048, 4, 2)),
  Published(
    'MaxText Mixtral 8x7B', 0.3523, False, 'natural, capacity 1.25, synthetic data',
    _request(_mixtral(1.25), 'v6e:16x16', 12, 4096, 1, 4),
  ),
  Published(
    'MaxText Mixtral 8x7B', 0.5256, True, 'natural, dropless, synthetic data',
    _request(_mixtral(1.0), 'v5p:4x4x8', 36, 4096, 1, 6),
  ),
)  # fmt: skip
