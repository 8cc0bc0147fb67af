"""Sequence classification: any of the decoders with a linear head on the last real token.

As transformers' JetMoeForSequenceClassification, which the model page of JetMoE advertises.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from openmoe.config import ModelConfig
from openmoe.layers.dense import Kernel
from openmoe.models import build_model
from openmoe.types import Array, Batch, RouterStats


@flax.struct.dataclass
class ClassifierOutput:
  """Class scores of sequences.

  Attributes:
    logits_bY: float32, one row of class scores per sequence.
    router_stats: as in ModelOutput.
  """

  logits_bY: Array
  router_stats: RouterStats | None


class SequenceClassifier(nn.Module):
  """Parameters: `backbone`, those of the language model, and `score/kernel` [d, classes]."""

  config: ModelConfig
  num_classes: int

  @nn.compact
  def __call__(self, batch: Batch, train: bool) -> ClassifierOutput:
    """One sequence a row, padding (segment 0) on the right; an empty row is judged at its start."""
    out = build_model(self.config, name='backbone')(batch, train)
    place_t = jnp.arange(batch.inputs.shape[1])
    last_b = jnp.max(jnp.where(batch.segment_ids > 0, place_t, 0), axis=1)
    hidden_bd = jnp.take_along_axis(out.hidden_btd, last_b[:, None, None], axis=1)[:, 0]
    shape, axes = (self.config.embed_dim, self.num_classes), ('embed', 'classes')
    kernel = Kernel(shape, axes, nn.initializers.normal(self.config.init_std), name='score')()
    return ClassifierOutput(hidden_bd.astype(jnp.float32) @ kernel, out.router_stats)
