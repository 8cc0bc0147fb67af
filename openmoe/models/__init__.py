"""Models: the same layers and one interface (see openmoe.models.openmoe.ModelOutput)."""

import flax.linen as nn

from openmoe.config import Architecture, ModelConfig
from openmoe.models import jetmoe, openmoe
from openmoe.models.jetmoe import JetMoE
from openmoe.models.openmoe import ModelOutput, OpenMoE

__all__ = ['JetMoE', 'ModelOutput', 'OpenMoE', 'build_model', 'init_decode_cache']


def build_model(config: ModelConfig, name: str | None = None) -> nn.Module:
  """The decoder that a config describes; inside a module, a submodule of this name."""
  match config.architecture:
    case Architecture.OPENMOE:
      return OpenMoE(config, name=name)
    case Architecture.JETMOE:
      return JetMoE(config, name=name)


def init_decode_cache(config: ModelConfig, batch: int, length: int) -> dict:
  """Empty key-value caches for the model's `decode`, `length` tokens a row."""
  match config.architecture:
    case Architecture.OPENMOE:
      return openmoe.init_decode_cache(config, batch, length)
    case Architecture.JETMOE:
      return jetmoe.init_decode_cache(config, batch, length)
