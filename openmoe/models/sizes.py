"""The published sizes by name, for programs that may not run a configuration.

gin/models holds the same sizes for training; tests/test_configs.py keeps the two equal, field by
field.
"""

from __future__ import annotations

import dataclasses

from openmoe.config import (
  Architecture,
  Dispatch,
  ModelConfig,
  MoEConfig,
  Remat,
  RouterLoss,
  RouterOrder,
)


def _openmoe(name: str, experts: int, **fields) -> ModelConfig:
  """An OpenMoE, dense where experts is 0."""
  moe = MoEConfig(experts, router_z_weight=fields.pop('router_z_weight', 1e-4)) if experts else None
  scale = 0.1 if experts else 1.0
  return ModelConfig(name, **({'vocab_size': 256384} | fields), moe=moe, init_scale=scale)


def jetmoe_routing(experts: int, init_std: float = 0.01) -> MoEConfig:
  """JetMoE's routing: dropless, softmax over the chosen, losses summed over routers."""
  return MoEConfig(
    experts,
    dispatch=Dispatch.DROPLESS,
    router_order=RouterOrder.TOP_K_SOFTMAX,
    router_loss=RouterLoss.SUM,
    router_init_std=init_std,
    ignore_padding=True,
    router_z_weight=0.001,
  )


def _jetmoe(name: str, init_std: float, **fields) -> ModelConfig:
  return ModelConfig(
    name,
    num_sparse_layers=fields['num_layers'],
    moe=jetmoe_routing(8, init_std),
    init_std=init_std,
    final_norm_epsilon=1e-5,
    architecture=Architecture.JETMOE,
    **fields,
  )


_BASE = {'num_layers': 12, 'embed_dim': 768, 'mlp_dim': 2048, 'num_heads': 12, 'head_dim': 64}
_LARGE = {'num_layers': 24, 'embed_dim': 2048, 'mlp_dim': 8192, 'num_heads': 24, 'head_dim': 128}
_LARGE |= {'remat': Remat.FULL}
_TINY = {'vocab_size': 2048, 'num_layers': 4, 'embed_dim': 128, 'mlp_dim': 256, 'head_dim': 32}
_TINY |= {'dtype': 'float32'}


def _tiny(config: ModelConfig) -> ModelConfig:
  return dataclasses.replace(config, moe=dataclasses.replace(config.moe, group_size=256))


SIZES: dict[str, ModelConfig] = {
  config.name: config
  for config in (
    _openmoe('openmoe_base', 16, num_sparse_layers=3, **_BASE),
    _openmoe('openmoe_8b', 32, num_sparse_layers=4, **_LARGE),
    _openmoe(
      'openmoe_34b',
      32,
      num_sparse_layers=8,
      router_z_weight=0.001,
      **(_LARGE | {'num_layers': 32, 'embed_dim': 3072, 'mlp_dim': 12288}),
    ),
    _openmoe('openllama_base', 0, **_BASE),
    _openmoe('openllama_large', 0, **_LARGE),
    _tiny(_openmoe('openmoe_tiny', 8, num_sparse_layers=2, num_heads=4, **_TINY)),
    _jetmoe(
      'jetmoe_8b',
      0.01,
      vocab_size=32000,
      num_layers=24,
      embed_dim=2048,
      mlp_dim=5632,
      num_heads=16,
      head_dim=128,
      remat=Remat.FULL,
    ),
    _tiny(_jetmoe('jetmoe_tiny', 0.02, num_heads=2, **_TINY)),
  )
}
