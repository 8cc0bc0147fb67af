"""The modified UL2 objective as a seqio preprocessor over tokenised documents.

Six denoisers: five span corruptions and a prefix language model, the kind announced by an ordinary
text prefix ("[NLU] ", "[NLG] ", "[S2S] "). One function, two modes:

- `fixed` (default): documents joined with EOS into one stream, read once. The stream is cut into
  blocks that hold every denoiser in exact proportion, in a random order; chunk lengths leave room
  for the mode prefix and make examples fill whole or half rows.
- `reference`: every quirk of the released pipeline that changes tokens. Six copies of the stream,
  each reading its sixth of the joined documents; no separators; a mode prefix that later trimming
  pays for with the last sentinel; a second 65536-token selection for the prefix language model.
  Use seqio.preprocessors.append_eos_after_trim after it, as the released tasks do.

What it does not do: pack. features.py packs.
"""

from __future__ import annotations

import dataclasses
import enum
import fractions
import functools
import math
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

from openmoe.config import ConfigError, parse_enum
from openmoe.data import concat, spans


class Mode(enum.Enum):
  FIXED = 'fixed'
  REFERENCE = 'reference'


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """One of the mixture's objectives.

  Attributes:
    mean_span: mean length of a noise span; None is the prefix language model.
    noise_density: share of the tokens that is noise.
    weight: relative frequency of its examples.
    prefix: text put before the inputs.
  """

  mean_span: float | None
  noise_density: float
  weight: float
  prefix: str


DENOISERS = (
  Denoiser(3, 0.15, 0.1, '[NLU] '),
  Denoiser(8, 0.15, 0.1, '[NLU] '),
  Denoiser(3, 0.5, 0.1, '[NLG] '),
  Denoiser(8, 0.5, 0.1, '[NLG] '),
  Denoiser(64, 0.5, 0.1, '[NLG] '),
  Denoiser(None, 0.5, 0.5, '[S2S] '),
)

# The released pipeline draws its six streams with this constant, whatever the run's seed.
RELEASED_SAMPLING_SEED = 7

# Least tokens of a block: enough for TensorFlow's cost per call to vanish at short lengths.
_MIN_BLOCK = 16384


def fixed_lengths(
  denoiser: Denoiser, sequence_length: Mapping[str, int], prefix_tokens: int
) -> spans.SpanLengths:
  """Chunk of the fixed mode: the longest that fits, in a whole or exactly half a packed row.

  Both features hold their EOS and the inputs their mode prefix, so nothing is trimmed later. An
  example that cannot use most of a row takes half of one, so that two always fit.

  Raises:
    ConfigError: if the lengths leave no room for two tokens of text.
  """
  limit_in, limit_out = sequence_length['inputs'], sequence_length['targets']
  row = limit_in + limit_out

  def measure(raw: int) -> spans.SpanLengths:
    if denoiser.mean_span is None:
      return spans.SpanLengths(raw, prefix_tokens + 1, raw + 1, 0)
    found = spans.span_lengths(raw, denoiser.mean_span, denoiser.noise_density)
    return dataclasses.replace(
      found, inputs=found.inputs + prefix_tokens, spans=max(found.spans, 1)
    )

  def fits(raw: int, budget: int) -> bool:
    found = measure(raw)
    inside = found.inputs + found.targets <= budget
    if denoiser.mean_span is None:
      # Some split must respect both limits; split_prefix keeps to them.
      return inside
    return inside and found.inputs <= limit_in and found.targets <= limit_out

  def longest(budget: int) -> int:
    raw = 0
    while fits(raw + 1, budget):
      raw += 1
    return raw

  raw = longest(row) if denoiser.mean_span is not None else 0
  used = measure(raw).inputs + measure(raw).targets
  if denoiser.mean_span is None or used < 0.9 * row:
    raw = longest(row // 2)
  if raw < 2:
    raise ConfigError(
      f'task_feature_lengths={dict(sequence_length)} leave no room for {denoiser}, whose mode '
      f'prefix takes {prefix_tokens} tokens; lengthen inputs and targets.'
    )
  return measure(raw)


def _check(sequence_length, output_features, denoisers, lengths) -> None:
  available = output_features['targets'].vocabulary.extra_ids
  for denoiser, length in zip(denoisers, lengths, strict=True):
    if length.spans > available:
      raise ConfigError(
        f'{denoiser} needs {length.spans} sentinels at task_feature_lengths='
        f'{dict(sequence_length)}, and the vocabulary has {available} extra ids; shorten the '
        'lengths or use a vocabulary with more extra_ids.'
      )


def _prefix_ids(denoiser: Denoiser, output_features, mode_prefixes: bool) -> list[int]:
  if not mode_prefixes:
    return []
  return [int(i) for i in output_features['targets'].vocabulary.encode(denoiser.prefix)]


def ul2_objective(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  output_features: Mapping[str, seqio.Feature],
  mode: Mode | str = Mode.FIXED,
  denoisers: Sequence[Denoiser] = DENOISERS,
  mode_prefixes: bool = True,
  corpus: str | None = None,
) -> tf.data.Dataset:
  """Examples {'inputs', 'targets'} of the denoiser mixture, from tokenised documents.

  Args:
    dataset: {'targets': int32 [t]}, optionally 'document_id': int64 [].
    sequence_length: {'inputs', 'targets'}; what either may hold, EOS and prefix included (fixed).
    output_features: their vocabulary gives the sentinels, EOS and the prefix tokens.
    mode: see the module's text.
    denoisers: the mixture.
    mode_prefixes: False for the noprefix tasks.
    corpus: name of the corpus, to leave documents out (fixed mode).

  Returns:
    {'inputs', 'targets': int32 [...]}; fixed mode adds 'objective': int32 [], the index into
    denoisers, and 'document_ids': int64 [2], where its first and last token came from.

  Raises:
    ConfigError: lengths that do not fit, or more spans than sentinels.
  """
  if not {'inputs', 'targets'} <= set(sequence_length or ()):
    told = None if sequence_length is None else dict(sequence_length)
    raise ConfigError(
      f"task_feature_lengths={told}: UL2 needs both, as {{'inputs': 1024, 'targets': 1024}}."
    )
  mode = parse_enum(Mode, mode, 'ul2_objective.mode')
  given = dataset, sequence_length, output_features, tuple(denoisers), mode_prefixes
  return _fixed(*given, corpus) if mode is Mode.FIXED else _reference(*given)


def block_counts(denoisers: Sequence[Denoiser]) -> list[int]:
  """Examples of each denoiser in the smallest block with the exact shares.

  >>> block_counts(DENOISERS)
  [1, 1, 1, 1, 1, 5]
  """
  weights = [fractions.Fraction(d.weight).limit_denominator(1000) for d in denoisers]
  common = math.lcm(*(w.denominator for w in weights))
  counts = [int(w * common) for w in weights]
  divisor = math.gcd(*counts)
  if not divisor:
    raise ConfigError(f'All denoiser weights are 0: {denoisers}; give one a positive weight.')
  return [count // divisor for count in counts]


def _fixed(dataset, sequence_length, output_features, denoisers, mode_prefixes, corpus):
  vocabulary = output_features['targets'].vocabulary
  prefixes = [_prefix_ids(d, output_features, mode_prefixes) for d in denoisers]
  lengths = [
    fixed_lengths(d, sequence_length, len(p)) for d, p in zip(denoisers, prefixes, strict=True)
  ]
  _check(sequence_length, output_features, denoisers, lengths)
  plan = _Plan(
    denoisers,
    tuple(map(tuple, prefixes)),
    tuple(length.raw for length in lengths),
    sequence_length['inputs'],
    sequence_length['targets'],
    vocabulary.vocab_size - 1,
    vocabulary.eos_id,
  )
  denoise = _block_denoiser(plan)
  blocks = concat.continuous_blocks(dataset, plan.block_length, plan.eos_id, corpus)

  @seqio.map_over_dataset(num_seeds=1)
  @concat.plain
  def denoise_block(block, seed):
    return denoise(block['tokens'], block['documents'], block['length'], seed)

  return denoise_block(blocks).unbatch()


@dataclasses.dataclass(frozen=True)
class _Plan:
  """All that decides what a block of the fixed mode becomes; hashable, to trace it only once."""

  denoisers: tuple[Denoiser, ...]
  prefixes: tuple[tuple[int, ...], ...]
  raw: tuple[int, ...]
  inputs_length: int
  targets_length: int
  first_sentinel: int
  eos_id: int

  @property
  def counts(self) -> list[int]:
    """Chunks of each denoiser in a block: exact shares, and enough tokens to be worth a call."""
    counts = block_counts(self.denoisers)
    smallest = sum(c * n for c, n in zip(counts, self.raw, strict=True))
    return [c * -(-_MIN_BLOCK // smallest) for c in counts]

  @property
  def block_length(self) -> int:
    return sum(c * n for c, n in zip(self.counts, self.raw, strict=True))

  @property
  def slots(self) -> tuple[list[int], list[int]]:
    """Denoiser of every chunk of a block, span corruptions and prefix splits apart."""
    kinds = [kind for kind, count in enumerate(self.counts) for _ in range(count)]
    is_span = [d.mean_span is not None for d in self.denoisers]
    return [k for k in kinds if is_span[k]], [k for k in kinds if not is_span[k]]

  def corrupt(self, kinds: Sequence[int], tokens, sizes, seeds):
    """(inputs, targets) of chunks of the span corruptions `kinds`, ragged."""
    return spans.corrupt_spans(
      tokens,
      sizes,
      [self.denoisers[k].mean_span for k in kinds],
      [self.denoisers[k].noise_density for k in kinds],
      seeds,
      self.first_sentinel,
      [self.prefixes[k] for k in kinds],
      self.eos_id,
    )

  def split(self, kinds: Sequence[int], tokens, sizes, seeds):
    """(inputs, targets) of chunks of prefix language models, ragged."""
    prefixes = [self.prefixes[k] for k in kinds]
    longest = max(map(len, prefixes))
    return spans.split_prefix(
      tokens,
      sizes,
      seeds[0],
      prefixes,
      self.eos_id,
      max_inputs=self.inputs_length - 1 - longest,
      max_targets=self.targets_length - 1,
    )


@functools.lru_cache(maxsize=16)
def _block_denoiser(plan: _Plan):
  """The function block -> examples. Cached: every shard and every task shares one trace."""
  parts = [(kinds, step) for kinds, step in zip(plan.slots, (plan.corrupt, plan.split), strict=True)
           if kinds]  # fmt: skip
  kinds = [kind for of_part, _ in parts for kind in of_part]
  raw_of_slot = [plan.raw[kind] for kind in kinds]

  def denoise(tokens, documents, length, seed):
    seeds = tf.random.split(seed, 5)
    # A random order of the slots decides which part of the stream each denoiser gets.
    order = tf.argsort(tf.random.stateless_uniform([len(kinds)], seeds[4]))
    starts = tf.cumsum(tf.gather(tf.constant(raw_of_slot, tf.int32), order), exclusive=True)
    start_of_slot = tf.gather(starts, tf.argsort(order))
    sizes = tf.clip_by_value(length - start_of_slot, 0, tf.constant(raw_of_slot, tf.int32))
    inputs, targets, first = [], [], 0
    padded = tf.pad(tokens, [[0, max(raw_of_slot)]])
    for part, (of_part, step) in enumerate(parts):
      here = slice(first, first + len(of_part))
      first = here.stop
      # Chunks of shorter kinds run on into their neighbours; their sizes cut that off.
      longest = max(raw_of_slot[here])
      chunks = tf.gather(padded, start_of_slot[here, None] + tf.range(longest)[None])
      pair = step(of_part, chunks, sizes[here], (seeds[2 * part], seeds[2 * part + 1]))
      inputs.append(pair[0])
      targets.append(pair[1])
    # Only the last block of a finite dataset is short. Its empty chunks are no examples, nor is
    # one of a single token, which span corruption could only give a sentinel without a partner.
    full = tf.boolean_mask(order, starts + 1 < length)
    last = start_of_slot + tf.maximum(sizes, 1) - 1
    ends = tf.minimum(tf.stack([start_of_slot, last], axis=1), length - 1)
    return {
      'inputs': tf.gather(_joined(inputs), full),
      'targets': tf.gather(_joined(targets), full),
      'objective': tf.gather(tf.constant(kinds, tf.int32), full),
      'document_ids': tf.gather(concat.chunk_ids(documents, ends), full),
    }

  vector = tf.TensorSpec([plan.block_length], tf.int32)
  signature = [
    vector, tf.TensorSpec([plan.block_length], tf.int64),
    tf.TensorSpec([], tf.int32), tf.TensorSpec([2], tf.int64),
  ]  # fmt: skip
  return tf.function(denoise, input_signature=signature, autograph=False)


def _joined(ragged: Sequence[tf.RaggedTensor]) -> tf.RaggedTensor:
  """The rows of all, in order."""
  return tf.RaggedTensor.from_row_lengths(
    tf.concat([r.flat_values for r in ragged], axis=0),
    tf.concat([r.row_lengths() for r in ragged], axis=0),
    validate=False,
  )


def _reference(dataset, sequence_length, output_features, denoisers, mode_prefixes):
  vocabulary = output_features['targets'].vocabulary
  limit = sequence_length.get('inputs', 0)
  lengths = [
    spans.SpanLengths(limit - 1, limit, limit, 0)
    if d.mean_span is None
    else spans.released_lengths(limit, d.mean_span, d.noise_density)
    for d in denoisers
  ]
  _check(sequence_length, output_features, denoisers, lengths)
  for denoiser, length in zip(denoisers, lengths, strict=True):
    if denoiser.mean_span is not None and sequence_length['targets'] < length.targets:
      raise ConfigError(
        f'{denoiser} gives {length.targets} target tokens at inputs={limit}, more than targets='
        f'{sequence_length["targets"]}; raise targets.'
      )
  joined = concat.released_groups(concat.released_random_chunk(dataset))
  streams = []
  for index, (denoiser, length) in enumerate(zip(denoisers, lengths, strict=True)):
    stream = joined.shard(len(denoisers), index)
    prefix = _prefix_ids(denoiser, output_features, mode_prefixes)
    if denoiser.mean_span is None:
      # The second selection of 65536 tokens throws most of a group of documents away: released.
      stream = concat.released_random_chunk(stream)
    chunks = concat.split_groups(stream, length.raw)
    streams.append(_denoise_one(chunks, denoiser, prefix, vocabulary.vocab_size - 1))
  return tf.data.Dataset.sample_from_datasets(
    streams,
    weights=[d.weight for d in denoisers],
    seed=RELEASED_SAMPLING_SEED,
    stop_on_empty_dataset=False,
  )


def _denoise_one(chunks, denoiser: Denoiser, prefix, first_sentinel: int) -> tf.data.Dataset:
  @seqio.map_over_dataset(num_seeds=2)
  @concat.plain
  def denoise(chunk, seeds):
    tokens, size = chunk['tokens'][None], chunk['length'][None]
    if denoiser.mean_span is None:
      inputs, targets = spans.split_prefix(tokens, size, seeds[0], [prefix])
    else:
      kind = ([denoiser.mean_span], [denoiser.noise_density])
      inputs, targets = spans.corrupt_spans(tokens, size, *kind, seeds, first_sentinel, [prefix])
    return {'inputs': inputs[0], 'targets': targets[0]}

  return denoise(chunks)
