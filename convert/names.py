"""The one name table: our parameters beside the names that other formats give them.

Ours are stacked over scanned layers; elsewhere every layer has arrays of its own. A `Row` says
which slice of which of our arrays is which foreign tensor, and how it is reshaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from openmoe.config import ModelConfig
from openmoe.models.openmoe import group_shape


@dataclasses.dataclass(frozen=True)
class Row:
  """One foreign tensor.

  Attributes:
    ours: '/'-joined path of our array.
    index: leading indices into it (group, or group and dense layer); () takes it whole.
    t5x: '/'-joined path in a t5x / flaxformer checkpoint.
    gated: ours is [..., d, 2, f] where the other has [..., d, 2f].
  """

  ours: str
  index: tuple[int, ...]
  t5x: str
  gated: bool = False

  def to_t5x(self, ours: np.ndarray) -> np.ndarray:
    """The foreign tensor from our whole array."""
    x = ours[self.index]
    return x.reshape(*x.shape[:-2], -1) if self.gated else x

  def from_t5x(self, theirs: np.ndarray) -> np.ndarray:
    """Our slice from the foreign tensor."""
    if not self.gated:
      return theirs
    return theirs.reshape(*theirs.shape[:-1], 2, theirs.shape[-1] // 2)


# Inside a block: our path -> t5x path, and whether it is a double gate.
_ATTENTION = {
  'pre_attention_norm/scale': 'pre_self_attention_layer_norm/scale',
  'attention/query/kernel': 'self_attention/query/kernel',
  'attention/key/kernel': 'self_attention/key/kernel',
  'attention/value/kernel': 'self_attention/value/kernel',
  'attention/out/kernel': 'self_attention/out/kernel',
  'pre_mlp_norm/scale': 'pre_mlp_layer_norm/scale',
}
_DENSE = _ATTENTION | {f'mlp/{w}/kernel': f'mlp/{w}/kernel' for w in ('wi_0', 'wi_1', 'wo')}
_SPARSE = _ATTENTION | {
  'moe/router/kernel': 'mlp/router/router_weights/w/kernel',
  'moe/experts/wi_0/kernel': 'mlp/expert/wi_0/kernel',
  'moe/experts/wi_1/kernel': 'mlp/expert/wi_1/kernel',
  'moe/experts/wo/kernel': 'mlp/expert/wo/kernel',
  'pre_extra_mlp_norm/scale': 'pre_extra_mlp_layer_norm/scale',
  'extra_mlp/wi_0/kernel': 'extra_mlp/wi_0/kernel',
  'extra_mlp/wi_1/kernel': 'extra_mlp/wi_1/kernel',
  'extra_mlp/wo/kernel': 'extra_mlp/wo/kernel',
}


def name_table(config: ModelConfig) -> Iterator[Row]:
  """Every foreign tensor of a model, in layer order."""
  yield Row('token_embedder/embedding', (), 'token_embedder/embedding')
  groups, num_dense, sparse = group_shape(config)
  period = num_dense + int(sparse)
  for layer in range(groups * period):
    group, place = divmod(layer, period)
    is_sparse = sparse and place == num_dense
    kind, index = ('sparse', (group,)) if is_sparse else ('dense', (group, place))
    for ours, theirs in (_SPARSE if is_sparse else _DENSE).items():
      path = f'decoder/layers_{layer}/{theirs}'
      yield Row(f'decoder/{kind}/{ours}', index, path, gated='wi_0' in ours)
  yield Row('decoder_norm/scale', (), 'decoder/decoder_norm/scale')
  yield Row('logits_dense/kernel', (), 'decoder/logits_dense/kernel')
