"""The OpenMoE decoder: dense blocks, every p-th one sparse; OpenLLaMA is the same without sparse.

Layers come in equal groups of p - 1 dense blocks and one sparse block. Groups are scanned, and so
are the dense blocks inside a group, so the program does not grow with depth. Decoding is not
scanned (decoding.py).
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import ModelConfig
from openmoe.layers.dense import Attention, Embed, Kernel, KVCache, Mlp, RMSNorm, packed_mask
from openmoe.layers.moe.exchange import through_experts
from openmoe.layers.moe.layer import MoeLayer, scaled_init
from openmoe.models.common import (
  ACT,
  BlockContext,
  Cache,
  ModelOutput,
  group_shape,
  rematerialised,
  scanned,
)
from openmoe.models.decoding import decode_context, layer_name, unrolled
from openmoe.types import Array, Batch, RouterStats


def token_mask(inputs_bt: Array) -> Array:
  """bool [b, t]: False on padding of the decoder inputs.

  Id 0 is padding and also starts every segment, so a 0 counts as real when it comes first or
  before a real token (flaxformer dense_attention.py `get_decoder_logit_mask`).
  """
  following = jnp.pad(inputs_bt[:, 1:], ((0, 0), (0, 1)))
  first = jnp.arange(inputs_bt.shape[1]) == 0
  return (inputs_bt > 0) | (following > 0) | first


class Residual(nn.Module):
  """Adds a branch to the stream, with the original's rounding.

  There the stream is bfloat16 until the first sparse layer, whose float32 output promotes it for
  good. A scan carries one dtype, so the stream is kept in float32 and sums before that layer are
  rounded to bfloat16; reduce_precision, because XLA may drop a cast down and up again.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, r_btd: Array, y_btd: Array, narrow: Array, train: bool) -> Array:
    """narrow: bool scalar, True before the first sparse layer's output."""
    rate = self.config.dropout_rate
    y_btd = nn.Dropout(rate, broadcast_dims=(-2,))(y_btd, deterministic=not train)
    sum_btd = r_btd + y_btd
    if sum_btd.dtype == jnp.float32 and self.config.dtype == 'bfloat16':
      rounded = jax.lax.reduce_precision(sum_btd, exponent_bits=8, mantissa_bits=7)
      sum_btd = jnp.where(narrow, rounded, sum_btd)
    return partitioning.shard(sum_btd, ACT)


class Block(nn.Module):
  """Pre-norm block: attention, then MLP (dense) or MoE and extra MLP in sequence (sparse)."""

  config: ModelConfig
  sparse: bool
  train: bool
  run_experts: Callable[..., Array] = through_experts

  @nn.compact
  def __call__(
    self, r_btd: Array, cache: KVCache | None, narrow: Array, context: BlockContext
  ) -> tuple[Array, tuple[KVCache | None, RouterStats | None]]:
    """Residual stream in, residual stream and (cache, router statistics) out."""
    cfg, train, dtype = self.config, self.train, jnp.dtype(self.config.dtype)

    def normed(name: str, r: Array) -> Array:
      return RMSNorm(dtype, cfg.norm_epsilon, name=name)(r) * context.token_mask_bt1

    residual = Residual(cfg, name='residual')
    heads = (cfg.num_heads, cfg.head_dim, dtype, cfg.init_scale, cfg.rope_theta)
    attention = Attention(*heads, cfg.float32_attention, cfg.dropout_rate, name='attention')
    x = normed('pre_attention_norm', r_btd)
    mask, positions = context.mask_bts, context.positions_bt
    y, cache = attention(x, mask, positions, train, cache, context.cache_slot)
    r_btd = residual(r_btd, y, narrow, train)

    x = normed('pre_mlp_norm', r_btd)
    sizes = (cfg.mlp_dim, dtype, cfg.init_scale, cfg.dropout_rate)
    if not self.sparse:
      y = Mlp(*sizes, name='mlp')(x, train)
      return residual(r_btd, y, narrow, train), (cache, None)

    wide = jnp.zeros((), bool)  # the float32 MoE output ends the narrow part of the stream
    valid_bt = context.token_mask_bt1[..., 0] > 0
    sparse = (cfg.moe, cfg.mlp_dim, dtype, scaled_init(cfg.init_scale), cfg.dropout_rate)
    moe = MoeLayer(*sparse, run_experts=self.run_experts, name='moe')
    y, stats = moe(x, valid_bt, train)
    r_btd = residual(r_btd, y, wide, train)
    x = normed('pre_extra_mlp_norm', r_btd)
    y = Mlp(*sizes, name='extra_mlp')(x, train)
    return residual(r_btd, y, wide, train), (cache, stats)


class BlockGroup(nn.Module):
  """The repeating unit: some dense blocks (scanned), then a sparse one if the model has any."""

  config: ModelConfig
  num_dense: int
  sparse: bool
  train: bool

  @nn.compact
  def __call__(self, r_btd: Array, narrow: Array, context: BlockContext):
    cfg, block = self.config, rematerialised(Block, self.config.remat)
    stats = None
    if self.num_dense:
      dense = scanned(block, self.num_dense, 'layers', (0, nn.broadcast, nn.broadcast))(
        cfg, sparse=False, train=self.train, name='dense'
      )
      r_btd, _ = dense(r_btd, None, narrow, context)
    if self.sparse:
      sparse = block(cfg, sparse=True, train=self.train, name='sparse')
      r_btd, (_, stats) = sparse(r_btd, None, narrow, context)
    return r_btd, stats


class OpenMoE(nn.Module):
  """Decoder-only language model."""

  config: ModelConfig
  run_experts: Callable[..., Array] = through_experts  # how `decode` moves rows there and back

  @nn.compact
  def __call__(self, batch: Batch, train: bool) -> ModelOutput:
    """Runs packed rows; the loss takes hidden states and output kernel from the result."""
    mask_bt = token_mask(batch.inputs)
    positions = jnp.arange(batch.inputs.shape[1], dtype=jnp.int32)[None]
    # Rotary positions count along the row and do not restart per segment, as released.
    positions_bt = jnp.broadcast_to(positions, batch.inputs.shape)
    mask_bts = packed_mask(batch.segment_ids, batch.targets > 0)
    context = BlockContext(mask_bts, mask_bt[..., None], positions_bt)
    return self._run(batch.inputs, context, None, train)

  @nn.compact
  def decode(
    self,
    tokens_bt: Array,
    positions_bt: Array,
    mask_bts: Array,
    cache: Cache,
    cache_slot: Array | int,
  ) -> ModelOutput:
    """Extends cached rows by t tokens; see decoding.py for the arguments."""
    context = decode_context(positions_bt, mask_bts, cache_slot)
    return self._run(tokens_bt, context, cache, train=False)

  def _run(self, tokens_bt, context: BlockContext, cache, train: bool) -> ModelOutput:
    cfg, dtype = self.config, jnp.dtype(self.config.dtype)
    context = context.replace(token_mask_bt1=context.token_mask_bt1.astype(dtype))
    dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=not train)
    r_btd = Embed(cfg.vocab_size, cfg.embed_dim, dtype, name='token_embedder')(tokens_bt)
    r_btd = partitioning.shard(dropout(r_btd).astype(dtype), ACT)
    groups, num_dense, sparse = group_shape(cfg)
    if sparse:
      r_btd = r_btd.astype(jnp.promote_types(dtype, jnp.float32))
    if cache is None:
      stack = scanned(BlockGroup, groups, 'groups', (0, nn.broadcast))
      stack = stack(cfg, num_dense, sparse, train, name='decoder')
      r_btd, stats = stack(r_btd, jnp.arange(groups) == 0, context)
    else:
      calls = [self._layer(i, context) for i in range(cfg.num_layers)]
      r_btd, cache, stats = unrolled(calls, r_btd, cache)
    hidden = dropout(RMSNorm(dtype, cfg.last_norm_epsilon, name='decoder_norm')(r_btd))
    hidden = hidden * context.token_mask_bt1
    init = nn.initializers.variance_scaling(cfg.init_scale, 'fan_in', 'truncated_normal')
    shape, axes = (cfg.embed_dim, cfg.vocab_size), ('embed', 'vocab')
    kernel_dv = Kernel(shape, axes, init, name='logits_dense')()
    return ModelOutput(hidden, kernel_dv, stats, cache)

  def _layer(self, layer: int, context: BlockContext) -> Callable:
    """One block of decoding, for `unrolled`."""
    cfg = self.config
    narrow = jnp.asarray(not cfg.num_sparse_layers or layer < cfg.sparse_period)
    block = lambda: Block(
      cfg, layer in cfg.sparse_layers, False, self.run_experts, name=layer_name(layer)
    )
    return lambda r_btd, kv: block()(r_btd, kv, narrow, context)
