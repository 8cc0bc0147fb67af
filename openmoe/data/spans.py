"""Span corruption and prefix splitting as pure tensor functions over rows of chunks.

Every function takes a batch of chunks at once ([b, t], one true length a row), so that one call
into TensorFlow denoises many examples. All randomness comes from an explicit stateless seed.
Nothing here knows datasets, vocabularies or weights: ul2.py does.

Source: T5's noise masks and helpers, as the released models used them.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class SpanLengths:
  """What a chunk of `raw` tokens becomes; lengths include the EOS of each side.

  Attributes:
    raw: tokens of text in a chunk.
    inputs, targets: tokens of the two features.
    spans: noise spans, one sentinel each on either side.
  """

  raw: int
  inputs: int
  targets: int
  spans: int


def span_lengths(raw: int, mean_span: float, noise_density: float) -> SpanLengths:
  """Lengths of both sides when `raw` tokens are corrupted, one EOS each, no mode prefix.

  Python's round is half to even, as tf.round in `noise_mask`.

  >>> span_lengths(1137, 3, 0.15)
  SpanLengths(raw=1137, inputs=1024, targets=229, spans=57)
  """
  noise = round(raw * noise_density)
  spans = round(noise / mean_span)
  return SpanLengths(raw, raw - noise + spans + 1, noise + spans + 1, spans)


def released_lengths(inputs_length: int, mean_span: float, noise_density: float) -> SpanLengths:
  """Raw chunk and target length the released pipeline uses for `inputs_length`.

  The longest raw length whose inputs fit, mode prefix not counted. At a density of exactly 0.5 a
  target longer than the inputs lowers both raw and target length by one; the returned target
  length is then that lowered number, which may be one more than what the chunk gives.

  >>> released_lengths(1024, 64, 0.5)
  SpanLengths(raw=2014, inputs=1024, targets=1024, spans=16)
  """
  raw = inputs_length - 1
  while span_lengths(raw + 1, mean_span, noise_density).inputs <= inputs_length:
    raw += 1
  found = span_lengths(raw, mean_span, noise_density)
  if noise_density == 0.5 and found.targets > found.inputs:
    lowered = span_lengths(raw - 1, mean_span, noise_density)
    return dataclasses.replace(lowered, targets=found.targets - 1)
  return found


def _partition_starts(items_b, parts_b, max_items: int, max_parts: int, seed):
  """Starts of a uniform split of items_b into parts_b non-empty runs: int32 [b, max_parts].

  Choosing parts - 1 of the items - 1 inner boundaries uniformly is what shuffling a 0/1 vector
  does. Entries past the last part equal the number of items.
  """
  rows = tf.shape(items_b)[0]
  zeros_b1 = tf.zeros([rows, 1], tf.int32)
  inner = max(min(max_parts - 1, max_items - 1), 0)
  if not inner:
    chosen = tf.zeros([rows, 0], tf.int32)
  else:
    draws = tf.random.stateless_uniform(
      [rows, max_items], seed, minval=0, maxval=1 << 30, dtype=tf.int32
    )
    index = tf.range(max_items)[None]
    inside = (index >= 1) & (index < items_b[:, None])
    # The position in the low bits breaks ties, so that exactly parts - 1 boundaries are chosen.
    keys = tf.cast(draws, tf.int64) * (1 << 24) + tf.cast(index, tf.int64)
    keys = tf.where(inside, keys, tf.int64.max)
    smallest = -tf.math.top_k(-keys, k=inner, sorted=True).values
    chosen = tf.cast(smallest % (1 << 24), tf.int32)
    in_use = tf.range(inner)[None] < parts_b[:, None] - 1
    chosen = tf.sort(tf.where(in_use, chosen, items_b[:, None]), axis=-1)
  padding = tf.tile(items_b[:, None], [1, max_parts - 1 - inner])
  return tf.concat([zeros_b1, chosen, padding], axis=1)


def _flags(starts, length: int):
  """int32 [b, length] with a 1 at every start; starts at or past `length` are ignored."""
  rows, count = tf.shape(starts)[0], tf.shape(starts)[1]
  starts = tf.minimum(starts, length)
  row_index = tf.tile(tf.range(rows)[:, None], [1, count])
  indices = tf.stack([row_index, starts], axis=-1)
  ones = tf.ones([rows, count], tf.int32)
  return tf.scatter_nd(indices, ones, [rows, length + 1])[:, :length]


def noise_starts(lengths_b, raw: int, mean_spans, noise_densities, seeds):
  """Where noise and non-noise spans start, for chunks of lengths_b <= raw tokens.

  The first span is never noise and the last always is; a chunk of one token has no noise.

  Args:
    lengths_b: int32 [b], true lengths.
    raw: static upper bound of the lengths (t).
    mean_spans, noise_densities: of the denoiser of each row; Python floats.
    seeds: two stateless seeds.

  Returns:
    (noise_start_bt, text_start_bt), int32 flags.
  """
  length = tf.maximum(lengths_b, 2)
  noise = tf.round(tf.cast(length, tf.float32) * tf.constant(noise_densities, tf.float32))
  noise = tf.clip_by_value(tf.cast(noise, tf.int32), 1, length - 1)
  spans = tf.round(tf.cast(noise, tf.float32) / tf.constant(mean_spans, tf.float32))
  spans = tf.maximum(tf.cast(spans, tf.int32), 1)
  text = length - noise
  # The bounds of shorter chunks follow from the longest one, as all three grow with the length.
  longest = max(raw, 2)
  noisiest = [min(round(longest * r) + 1, longest - 1) for r in noise_densities]
  most_spans = max(round(n / mu) + 1 for n, mu in zip(noisiest, mean_spans, strict=True))
  most_text = min(longest, longest - round(longest * min(noise_densities)) + 1)
  noise_at = _partition_starts(noise, spans, max(noisiest), most_spans, seeds[0])
  text_at = _partition_starts(text, spans, most_text, most_spans, seeds[1])
  text_end = tf.concat([text_at[:, 1:], text[:, None]], axis=1)
  # Text span j follows j noise spans, and noise span j follows j + 1 text spans.
  used = tf.range(most_spans)[None] < spans[:, None]
  noise_start_bt = _flags(tf.where(used, text_end + noise_at, raw), raw)
  text_start_bt = _flags(tf.where(used, text_at + noise_at, raw), raw)
  return noise_start_bt, text_start_bt


def noise_mask(noise_start_bt, text_start_bt):
  """bool [b, t], True where a token is noise."""
  return tf.cumsum(noise_start_bt - text_start_bt, axis=1) >= 0


def _ragged(values_bt, keep_bt) -> tf.RaggedTensor:
  """Rows of the kept values, in order."""
  row_lengths = tf.reduce_sum(tf.cast(keep_bt, tf.int64), axis=1)
  return tf.RaggedTensor.from_row_lengths(
    tf.boolean_mask(values_bt, keep_bt), row_lengths, validate=False
  )


def _framed(body_bt, keep_bt, prefixes, eos_id: int | None) -> tf.RaggedTensor:
  """Each row's prefix ++ its kept body ++ EOS, without ragged concatenation."""
  rows = tf.shape(body_bt)[0]
  values, keeps = [body_bt], [keep_bt]
  width = max(map(len, prefixes), default=0)
  if width:
    padded = [list(p) + [0] * (width - len(p)) for p in prefixes]
    values.insert(0, tf.constant(padded, tf.int32))
    keeps.insert(0, tf.constant([[i < len(p) for i in range(width)] for p in prefixes]))
  if eos_id is not None:
    values.append(tf.fill([rows, 1], eos_id))
    keeps.append(tf.ones([rows, 1], tf.bool))
  return _ragged(tf.concat(values, axis=1), tf.concat(keeps, axis=1))


def corrupt_spans(
  tokens_bt,
  lengths_b,
  mean_spans,
  noise_densities,
  seeds,
  first_sentinel: int,
  prefixes=(),
  eos_id=None,
) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
  """Span corruption of a batch of chunks, each with a denoiser of its own.

  inputs: the text with each noise span replaced by one sentinel. targets: per span its sentinel,
  then its noise; no final sentinel. Sentinels count down from first_sentinel.

  Args:
    tokens_bt: int32 [b, t]; t is static.
    lengths_b: int32 [b]; tokens past the length are ignored.
    mean_spans, noise_densities: of the denoiser of each row; Python floats.
    seeds: two stateless seeds (each int [2]).
    first_sentinel: id of <extra_id_0>.
    prefixes: ids put before the inputs of each row; () puts nothing.
    eos_id: appended to both sides; None appends nothing.

  Returns:
    (inputs, targets), int32 ragged [b, None].
  """
  raw = tokens_bt.shape[1]
  noise_start, text_start = noise_starts(lengths_b, raw, mean_spans, noise_densities, seeds)
  is_noise = noise_mask(noise_start, text_start)
  valid = tf.range(raw)[None] < lengths_b[:, None]

  def replaced(start_bt, hidden_bt, prefixes):
    starts = start_bt > 0
    sentinels = first_sentinel + 1 - tf.cumsum(start_bt, axis=1)
    body = tf.where(starts, sentinels, tokens_bt)
    return _framed(body, (starts | ~hidden_bt) & valid, prefixes, eos_id)

  return replaced(noise_start, is_noise, prefixes), replaced(text_start, ~is_noise, ())


def split_prefix(
  tokens_bt, lengths_b, seed, prefixes=(), eos_id=None, max_inputs=None, max_targets=None
) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
  """Prefix language modelling: the first k tokens are inputs, k uniform in 1 .. n - 1.

  A chunk of one token has empty inputs and one target.

  Args:
    tokens_bt, lengths_b, prefixes, eos_id: as in corrupt_spans.
    seed: one stateless seed.
    max_inputs, max_targets: text tokens either side may hold; None is no bound.
  """
  raw = tokens_bt.shape[1]
  high = tf.maximum(lengths_b - 1, 0)
  low = tf.minimum(tf.ones_like(high), high)
  if max_targets is not None:
    low = tf.maximum(low, lengths_b - max_targets)
  if max_inputs is not None:
    high = tf.minimum(high, max_inputs)
  high = tf.maximum(high, low)
  draw = tf.random.stateless_uniform(tf.shape(lengths_b), seed)
  span = tf.cast(high - low + 1, tf.float32)
  # float32 draws below 1 can round up to the bound for long ranges, hence the minimum.
  split_b = tf.minimum(low + tf.cast(tf.floor(draw * span), tf.int32), high)
  position = tf.range(raw)[None]
  is_input = position < split_b[:, None]
  valid = position < lengths_b[:, None]
  inputs = _framed(tokens_bt, is_input & valid, prefixes, eos_id)
  return inputs, _framed(tokens_bt, ~is_input & valid, (), eos_id)
