"""Models: the same layers and one interface (see openmoe.models.common.ModelOutput)."""

from collections.abc import Callable

import flax.linen as nn

from openmoe.config import Architecture, ModelConfig
from openmoe.layers.moe.exchange import through_experts
from openmoe.models.common import Cache, ModelOutput
from openmoe.models.decoding import gives_embeddings, init_decode_cache, is_expert_kernel, unstack
from openmoe.models.jetmoe import JetMoE
from openmoe.models.openmoe import OpenMoE

__all__ = [
  'Cache',
  'JetMoE',
  'ModelOutput',
  'OpenMoE',
  'build_model',
  'gives_embeddings',
  'init_decode_cache',
  'is_expert_kernel',
  'unstack',
]


def build_model(
  config: ModelConfig, name: str | None = None, run_experts: Callable = through_experts
) -> nn.Module:
  """The decoder that a config describes; inside a module, a submodule of this name.

  Args:
    run_experts: how `decode` moves rows to experts and back.
  """
  match config.architecture:
    case Architecture.OPENMOE:
      return OpenMoE(config, run_experts, name=name)
    case Architecture.JETMOE:
      return JetMoE(config, run_experts, name=name)
