"""The JetMoE decoder: every block a mixture of attention heads, then a mixture of gated MLPs.

Input and output embeddings are one table. Blocks are scanned. A model with one expert is an
ordinary dense decoder, which is what upcycling starts from.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.config import ModelConfig
from openmoe.layers.dense import Embed, Gating, KVCache, RMSNorm, packed_mask
from openmoe.layers.moe.exchange import through_experts
from openmoe.layers.moe.layer import MoeLayer
from openmoe.layers.moe.moa import MixtureOfAttention
from openmoe.models.common import ACT, BlockContext, Cache, ModelOutput, rematerialised, scanned
from openmoe.models.decoding import decode_context, layer_name, unrolled
from openmoe.types import Array, Batch, RouterStats


def swiglu(gate: Array, linear: None = None) -> Array:
  """silu(a) * b with a, b = gate[..., 0, :], gate[..., 1, :]: plain SwiGLU."""
  assert linear is None, 'SwiGLU has no third factor'
  return nn.silu(gate[..., 0, :]) * gate[..., 1, :]


SWIGLU = Gating(swiglu, has_linear=False)


class JetMoEBlock(nn.Module):
  """Pre-norm block; the residual stream is float32 throughout."""

  config: ModelConfig
  train: bool
  run_experts: Callable[..., Array] = through_experts

  @nn.compact
  def __call__(
    self, r_btd: Array, cache: KVCache | None, context: BlockContext
  ) -> tuple[Array, tuple[KVCache | None, RouterStats]]:
    """Residual stream in; stream, and (cache, statistics of both routers [2]) out."""
    cfg, train, dtype = self.config, self.train, jnp.dtype(self.config.dtype)
    init = nn.initializers.normal(cfg.init_std)
    valid_bt = context.token_mask_bt1[..., 0] > 0
    dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=not train)
    normed = lambda name: RMSNorm(dtype, cfg.norm_epsilon, name=name)(r_btd)

    attention = MixtureOfAttention(
      cfg.moe,
      cfg.num_heads,
      cfg.head_dim,
      dtype,
      init,
      cfg.rope_theta,
      cfg.dropout_rate,
      self.run_experts,
      name='attention',
    )
    where = (context.mask_bts, context.positions_bt, train, cache, context.cache_slot)
    y_btd, cache, attention_stats = attention(normed('pre_attention_norm'), valid_bt, *where)
    r_btd = partitioning.shard(r_btd + dropout(y_btd), ACT)

    moe = MoeLayer(
      cfg.moe,
      cfg.mlp_dim,
      dtype,
      lambda out_axis: init,
      cfg.dropout_rate,
      SWIGLU,
      bias=True,
      run_experts=self.run_experts,
      name='moe',
    )
    y_btd, mlp_stats = moe(normed('pre_mlp_norm'), valid_bt, train)
    r_btd = partitioning.shard(r_btd + dropout(y_btd), ACT)
    stats = jax.tree.map(lambda *pair: jnp.stack(pair), attention_stats, mlp_stats)
    return r_btd, (cache, stats)


class JetMoE(nn.Module):
  """Decoder-only language model with the interface of openmoe.OpenMoE."""

  config: ModelConfig
  run_experts: Callable[..., Array] = through_experts

  @nn.compact
  def __call__(self, batch: Batch, train: bool) -> ModelOutput:
    """Runs packed rows; rotary positions start again with every example."""
    real_bt = batch.segment_ids > 0
    mask_bts = packed_mask(batch.segment_ids, real_bt)
    context = BlockContext(mask_bts, real_bt[..., None], batch.positions)
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

  def _run(
    self, tokens_bt: Array, context: BlockContext, cache: Cache | None, train: bool
  ) -> ModelOutput:
    cfg, dtype = self.config, jnp.dtype(self.config.dtype)
    embed = Embed(cfg.vocab_size, cfg.embed_dim, dtype, cfg.init_std, name='token_embedder')
    dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,), deterministic=not train)
    r_btd = partitioning.shard(dropout(embed(tokens_bt)).astype(jnp.float32), ACT)
    if cache is None:
      block = rematerialised(JetMoEBlock, cfg.remat)
      stack = scanned(block, cfg.num_layers, 'layers', (0, nn.broadcast))
      r_btd, (_, stats) = stack(cfg, train, name='decoder')(r_btd, None, context)
    else:
      block = lambda layer: JetMoEBlock(cfg, train, self.run_experts, name=layer_name(layer))
      calls = [lambda r, kv, i=i: block(i)(r, kv, context) for i in range(cfg.num_layers)]
      r_btd, cache, stats = unrolled(calls, r_btd, cache)
    # [layers, 2, ...] -> one row a router, attention before MLP.
    stats = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stats)
    hidden = RMSNorm(dtype, cfg.last_norm_epsilon, name='decoder_norm')(r_btd)
    hidden = hidden * context.token_mask_bt1.astype(dtype)
    return ModelOutput(hidden, embed.table_vd.T, stats, cache)
