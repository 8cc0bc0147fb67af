"""What the decoders share: what they return, what their blocks see, how layers repeat."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from openmoe.config import ModelConfig, Remat
from openmoe.layers.dense import KVCache
from openmoe.types import Array, RouterStats

ACT = ('act_batch', 'act_length', 'act_embed')
Cache = tuple[KVCache, ...]  # one a layer


@flax.struct.dataclass
class ModelOutput:
  """What every model returns.

  Attributes:
    hidden_btd: final normed hidden states in the activation dtype; zero rows at padding.
    output_kernel_dv: float32 kernel of the output layer. The logits are hidden @ kernel in
      float32; the loss computes them in vocabulary blocks, so they are not returned.
    router_stats: stacked over sparse layers (leading l), None for a dense model.
    cache: updated key-value caches, None outside decoding.
  """

  hidden_btd: Array
  output_kernel_dv: Array
  router_stats: RouterStats | None
  cache: Cache | None = None

  def logits(self) -> Array:
    """float32 [b, t, v]; for tests and decoding, where few positions are wanted."""
    return self.hidden_btd.astype(jnp.float32) @ self.output_kernel_dv


@flax.struct.dataclass
class BlockContext:
  """What all blocks share.

  Attributes:
    mask_bts: bool, True where a query may look at a key.
    token_mask_bt1: 1 for real tokens, in the activation dtype; multiplies every block input.
    positions_bt: int32 rotary positions.
    cache_slot: int32 scalar, first cache slot to write, or None.
  """

  mask_bts: Array
  token_mask_bt1: Array
  positions_bt: Array
  cache_slot: Array | int | None = None


def group_shape(config: ModelConfig) -> tuple[int, int, bool]:
  """(groups, dense blocks per group, whether a sparse block closes each group) of OpenMoE."""
  if config.num_sparse_layers:
    return config.num_sparse_layers, config.sparse_period - 1, True
  return 1, config.num_layers, False


def rematerialised(module, remat: Remat):
  """A block class that recomputes in the backward pass what the config says."""
  match remat:
    case Remat.NONE:
      return module
    case Remat.DOTS:
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    case Remat.FULL:
      policy = None
  return nn.remat(module, policy=policy, prevent_cse=False)


def scanned(module, length: int, axis: str, in_axes):
  """A module class that runs `module` so many times, with parameters stacked along `axis`."""
  return nn.scan(
    module,
    variable_axes={'params': 0, 'intermediates': 0},
    split_rngs={'params': True, 'dropout': True},
    in_axes=in_axes,
    length=length,
    metadata_params={nn.PARTITION_NAME: axis},
  )
