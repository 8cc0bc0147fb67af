"""Token embedding: a lookup into a table whose rows may be split over the mesh."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from openmoe import partitioning
from openmoe.types import Array


def lookup(table_vd: Array, tokens_bt: Array) -> Array:
  """Rows of the table, [b, t, d].

  Each device looks up the tokens whose rows it holds and the pieces are summed, so neither a
  one-hot of the vocabulary nor a gathered table ever exists.
  """

  def local(table: Array, tokens: Array) -> Array:
    index = tokens - partitioning.shard_index('vocab') * table.shape[0]
    here = (index >= 0) & (index < table.shape[0])
    rows = jnp.take(table, jnp.where(here, index, 0), axis=0)
    return partitioning.all_reduce(jnp.where(here[..., None], rows, 0), 'vocab')

  in_axes = (('vocab', None), ('act_batch', 'act_length'))
  out_axes = ('act_batch', 'act_length', None)
  return partitioning.per_shard(local, in_axes, out_axes, table_vd, tokens_bt)


class Embed(nn.Module):
  """Unscaled embedding, normal, returned in `dtype`. `table_vd` is float32, for tied outputs."""

  vocab_size: int
  embed_dim: int
  dtype: jnp.dtype
  init_std: float = 1.0

  def setup(self):
    init = nn.initializers.normal(self.init_std)
    self.table_vd = self.param(
      'embedding',
      nn.with_logical_partitioning(init, ('vocab', 'embed')),
      (self.vocab_size, self.embed_dim),
      jnp.float32,
    )

  def __call__(self, tokens_bt: Array) -> Array:
    """int32 [b, t] -> [b, t, d]."""
    return lookup(self.table_vd.astype(self.dtype), tokens_bt)
