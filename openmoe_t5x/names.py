"""Between t5x's names of parameters and batches and ours; t5x itself is not needed.

Parameters are kept under the names of the original model, one array a layer, so that t5x's
checkpoints are those of the original and its Adafactor factors them as it did. They are stacked
where our decoder is called, which is differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.traverse_util as traverse
import jax.numpy as jnp
from flax.linen.partitioning import AxisMetadata

from convert.core.names import Row, name_table
from openmoe.config import Architecture, ModelConfig
from openmoe.models import abstract_params
from openmoe.types import Array, Batch, PyTree

FEATURES = {  # field of Batch: feature of seqio.DecoderFeatureConverter
  'inputs': 'decoder_input_tokens',
  'targets': 'decoder_target_tokens',
  'loss_weights': 'decoder_loss_weights',
  'segment_ids': 'decoder_segment_ids',
  'positions': 'decoder_positions',
}
# Our logical axes under the names that t5x's rules for mixtures of experts have.
_AXES = {'heads': 'joined_kv', 'router': 'unmodeled'}


@functools.cache
def _rows(config: ModelConfig) -> tuple[Row, ...]:
  return tuple(name_table(config))


def _has_names(config: ModelConfig) -> bool:
  """Whether t5x has names for a model; JetMoE's parameters keep ours, and stay stacked."""
  return config.architecture is Architecture.OPENMOE


def to_t5x(params: PyTree, config: ModelConfig) -> PyTree:
  """Our stacked parameters as t5x's tree."""
  if not _has_names(config):
    return params
  flat = traverse.flatten_dict(params, sep='/')
  tree = {row.t5x: row.to_t5x(flat[row.ours]) for row in _rows(config)}
  return traverse.unflatten_dict(tree, sep='/')


def from_t5x(params: PyTree, config: ModelConfig) -> PyTree:
  """t5x's tree as our stacked parameters."""
  if not _has_names(config):
    return params
  flat = traverse.flatten_dict(params, sep='/')
  pieces: dict[str, dict[tuple[int, ...], Array]] = {}
  for row in _rows(config):
    pieces.setdefault(row.ours, {})[row.index] = row.from_t5x(flat[row.t5x])
  stacked = {path: _stack(parts) for path, parts in pieces.items()}
  return traverse.unflatten_dict(stacked, sep='/')


def _stack(parts: Mapping[tuple[int, ...], Array]) -> Array:
  """One array of parts by their leading indices; () is the whole."""
  order = sorted(parts)
  lead = tuple(n + 1 for n in order[-1])
  if not lead:
    return parts[()]
  x = jnp.stack([parts[index] for index in order])
  return x.reshape(*lead, *x.shape[1:])


def params_axes(config: ModelConfig) -> PyTree:
  """The collection `params_axes`: logical axes of every parameter, under its name in t5x."""
  ours = traverse.flatten_dict(abstract_params(config)[1], sep='/')
  renamed = lambda axes: AxisMetadata(tuple(_AXES.get(axis, axis) for axis in axes))
  if _has_names(config):
    # Both halves of a gate lie side by side in one matrix there.
    own = lambda row: [a for a in ours[row.ours][len(row.index) :] if a != 'gate']
    named = {f'{row.t5x}_axes': renamed(own(row)) for row in _rows(config)}
  else:
    named = {f'{path}_axes': renamed(axes) for path, axes in ours.items()}
  return traverse.unflatten_dict(named, sep='/')


def to_batch(features: Mapping[str, Array]) -> Batch:
  """seqio's features as a Batch; rows that are not packed are one segment each."""
  found = {field: features.get(name) for field, name in FEATURES.items()}
  targets = found['targets']
  if found['loss_weights'] is None:
    found['loss_weights'] = targets > 0
  if found['segment_ids'] is None:
    found['segment_ids'] = (targets > 0).astype(jnp.int32)
  if found['positions'] is None:
    found['positions'] = jnp.broadcast_to(jnp.arange(targets.shape[1]), targets.shape)
  found['loss_weights'] = found['loss_weights'].astype(jnp.float32)
  return Batch(**found)
