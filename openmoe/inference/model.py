"""A language model as text tools want it: parameters on devices, a vocabulary, batches.

`LanguageModel` continues prompts and scores continuations. How requests are put into batches does
not matter to what they give (float32; capacity aside): rows do not see each other, positions do not
count padding, and draws are keyed by a request's own tokens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from openmoe import partitioning
from openmoe.config import ConfigError, Dispatch, ModelConfig
from openmoe.inference.chat import OPENMOE, ChatTemplate, Messages
from openmoe.inference.decode import OVERRIDE, Drops, Sampling, bucket, inference_config
from openmoe.inference.int8 import check_weights, quantised
from openmoe.inference.offload import is_offloaded
from openmoe.inference.placement import cast, expert_form, fingerprint, turn_experts
from openmoe.inference.rows import Generation, Rows
from openmoe.inference.scoring import score
from openmoe.layers.moe.override import Override
from openmoe.models.decoding import unstack
from openmoe.types import PyTree

BATCH_TOKENS = 1 << 15  # slots of a batch, prompts and continuations


class CapacityWarning(UserWarning):
  """Routing with capacity dropped choices, so rows depended on their neighbours."""


class TextVocabulary(Protocol):
  """What is needed of a vocabulary; seqio's have it."""

  eos_id: int
  pad_id: int

  def encode(self, text: str) -> Sequence[int]: ...

  def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Score:
  """How probable one continuation is.

  Attributes:
    log_prob: sum over its tokens, natural logarithm.
    token_log_probs: one a token.
    is_greedy: whether every token had the largest logit; True for no tokens.
  """

  log_prob: float
  token_log_probs: tuple[float, ...]
  is_greedy: bool


def row_keys(prompts: Sequence[Sequence[int]], samples: int, seed: int) -> np.ndarray:
  """A random seed [prompts, samples] of each row: a function of seed, tokens and sample alone.

  A prompt that comes again counts on from its earlier samples.
  """
  seen: dict[tuple[int, ...], int] = {}
  seeds = np.zeros((len(prompts), samples), np.uint32)
  for i, prompt in enumerate(prompts):
    first = seen.get(tuple(prompt), 0)
    seen[tuple(prompt)] = first + samples
    for j in range(samples):
      text = json.dumps([seed, first + j, *map(int, prompt)])
      seeds[i, j] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'little')
  return seeds


class LanguageModel:
  """Parameters of one model, ready to continue and to score.

  Args:
    config: of the model; its dtype is that of activations.
    params: the scanned tree of training, float32, on the mesh if there is one; or, when
      `unstacked`, as decoding.unstack gives it.
    vocabulary: of text.
    start_id: token that begins every sequence; the model adds it.
    max_length: tokens of a sequence, prompt and continuation together.
    name: for people and result files.
    mesh: of inference_mesh.
    capacity: see decode.inference_config.
    batch_rows: rows of a batch at most.
    chat_template: of encode_chat.
    eos_ids: tokens that end a text; none given means the vocabulary's.
    step: of the run's checkpoint that the parameters are of, if they are of one.
    weights: how kernels are held; see int8.WEIGHTS.

  Attributes:
    trained_config: as given; `config` is what inference makes of it.
    store: of experts that lie outside the device; None where all are on it.
    dropped_fraction: share of (token, choice) pairs that found no slot so far; 0.0 when dropless.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: PyTree,
    vocabulary: TextVocabulary,
    *,
    start_id: int = 0,
    max_length: int = 2048,
    name: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    capacity: bool = False,
    batch_rows: int = 16,
    unstacked: bool = False,
    chat_template: ChatTemplate = OPENMOE,
    eos_ids: Sequence[int] = (),
    step: int | None = None,
    weights: str = 'float',
  ):
    check_weights(weights, mesh)
    self.weights = weights
    self.trained_config, self.config = config, inference_config(config, capacity)
    self.vocabulary, self.start_id, self.max_length = vocabulary, start_id, max_length
    self.name, self.step = name or config.name, step
    self.mesh, self.chat_template = mesh, chat_template
    self.eos_ids = tuple(sorted({int(i) for i in eos_ids or (vocabulary.eos_id,)}))
    self._rows = batch_rows
    self._dropped = self._routed = 0.0
    self._warned = False
    if not unstacked:
      params = unstack(params, config, expert_form(config, mesh, capacity, weights))
    params = quantised(params, config, weights)
    stores = {
      leaf.store for leaf in jax.tree.leaves(params, is_leaf=is_offloaded) if is_offloaded(leaf)
    }
    self.store = stores.pop() if stores else None
    with self.on_mesh():
      params = jax.tree.map(jnp.asarray, cast(params, config))
      self.params = params if mesh is not None else turn_experts(params)

  def on_mesh(self) -> contextlib.AbstractContextManager:
    """The context in which its parameters are used."""
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  @cached_property
  def fingerprint(self) -> str:
    """sha256 of configuration and parameters as they are held; takes a second per gigabyte."""
    own = {name: leaf for name, leaf in self.params.items() if name != OVERRIDE}
    found, override = fingerprint(self.config, own), self.params.get(OVERRIDE)
    return found if override is None else override.fingerprint(found)

  def overridden(self, override: Override | None, **routing) -> LanguageModel:
    """The same weights with other decisions of the routers; shares memory with this model.

    Args:
      override: what is done to the decisions; None for nothing.
      routing: fields of MoEConfig in place of the model's: top_k, eval_capacity_factor.
    """
    other = copy.copy(self)
    other.__dict__.pop('fingerprint', None)
    moe = lambda config: dataclasses.replace(config.moe, **routing)
    if routing:
      other.config = dataclasses.replace(self.config, moe=moe(self.config))
      other.trained_config = dataclasses.replace(self.trained_config, moe=moe(self.trained_config))
    own = {name: leaf for name, leaf in self.params.items() if name != OVERRIDE}
    other.params = own if override is None else {**own, OVERRIDE: override}
    other.name = f'{self.name}*'  # results of it are never taken for the model's own
    other._dropped = other._routed = 0.0
    other._warned = False
    return other

  @property
  def drops(self) -> tuple[float, float]:
    """(choices that found no slot, all choices) so far; zeros when dropless."""
    return self._dropped, self._routed

  @property
  def dropped_fraction(self) -> float:
    return self._dropped / self._routed if self._routed else 0.0

  def encode_chat(self, messages: Messages, answer_follows: bool = True) -> list[int]:
    """Token ids of a conversation, up to where the answer begins; see openmoe.inference.chat."""
    text, vocabulary = self.chat_template.text(messages, answer_follows), self.vocabulary
    return self.chat_template.encode(text, vocabulary.encode, int(vocabulary.eos_id))

  # --- generation

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    sampling: Sampling = Sampling(),
    samples: int = 1,
    seed: int = 0,
    show: Callable[[str], None] | None = None,
  ) -> list[list[Generation]]:
    """Continues every prompt `samples` times.

    Args:
      prompts: token ids without the token that begins a sequence.
      max_new_tokens: at most so many, and no more than max_length leaves.
      stop: a continuation ends before the first of these, wherever tokens end.
      sampling: greedy unless it says otherwise.
      seed: of draws; the same seed and prompt give the same whatever else is asked for.
      show: called with each new piece of the text; for one prompt and one sample.

    Raises:
      ConfigError: there is nothing to do, or a prompt leaves no room for a token.
    """
    if not prompts or max_new_tokens < 1 or samples < 1:
      raise ConfigError(
        f'{len(prompts)} prompts, max_new_tokens={max_new_tokens}, samples={samples}: '
        'each must be at least 1.'
      )
    if any(not text for text in stop):
      raise ConfigError(f'stop={list(stop)} has an empty string, which every text contains.')
    if show is not None and len(prompts) * samples > 1:
      raise ConfigError(f'{len(prompts)} prompts with {samples} samples cannot be shown at once.')
    for i, prompt in enumerate(prompts):
      self.check_ids(f'Prompt {i}', prompt)
      self._check_length(f'Prompt {i}', len(prompt) + 2, 'shorten it')
    all_seeds = row_keys(prompts, samples, seed)
    results: list[list[Generation]] = [[] for _ in prompts]
    for first in range(0, samples, self._rows):
      seeds = all_seeds[:, first : first + self._rows]
      for batch in self._prompt_batches(prompts, seeds.shape[1], max_new_tokens):
        rows = Rows([prompts[i] for i in batch], seeds[batch], self)
        done = rows.run(max_new_tokens, tuple(stop), sampling, show)
        for i, found in zip(batch, done, strict=True):
          results[i] += found
    return results

  def _prompt_batches(self, prompts, samples: int, new: int) -> Iterator[list[int]]:
    """Indices of prompts that go together."""
    # Long ones first: the batch that may not fit into memory comes at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    most = self.max_length
    while order:
      slots = bucket(len(prompts[order[0]]) + 1, most) + bucket(min(new, most), most)
      rows = max(1, min(self._rows, BATCH_TOKENS // slots))
      count = max(1, rows // samples)
      yield order[:count]
      order = order[count:]

  # --- scoring

  def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    """Log-probabilities of continuations.

    Args:
      requests: (context, continuation) token ids, without the token that begins a sequence.
        Continuations of the same context share its pass. An empty continuation has probability 1.

    Raises:
      ConfigError: a request is longer than max_length.
    """
    for i, (context, continuation) in enumerate(requests):
      self.check_ids(f'Request {i}', [*context, *continuation])
      length = len(context) + 1 + len(continuation)
      self._check_length(f'Request {i}', length, 'cut its context from the left')
    results: list[Score | None] = [
      None if continuation else Score(0.0, (), True) for _, continuation in requests
    ]
    for batch in self._score_batches(requests):
      for i, result in zip(batch, self._score([requests[i] for i in batch]), strict=True):
        results[i] = result
    return results

  def _score_batches(self, requests) -> Iterator[list[int]]:
    """Indices of requests that go together: the same context, then like lengths."""
    key = lambda i: (-len(requests[i][0]), tuple(requests[i][0]), -len(requests[i][1]))
    order = sorted((i for i, (_, c) in enumerate(requests) if c), key=key)
    while order:
      first = len(requests[order[0]][0]) + 1
      batch, longest = [], 1
      for i in order[: self._rows]:
        new = max(longest, len(requests[i][1]))
        slots = bucket(first, self.max_length) + bucket(new, self.max_length)
        if batch and slots * (len(batch) + 1) > BATCH_TOKENS:
          break
        batch.append(i)
        longest = new
      yield batch
      order = order[len(batch) :]

  def _score(self, requests) -> Iterator[Score]:
    contexts = {tuple(context): None for context, _ in requests}
    index = {context: i for i, context in enumerate(contexts)}
    tokens, lengths = self._padded([[self.start_id, *context] for context in contexts])
    longest = max(len(continuation) for _, continuation in requests)
    width = 1 if longest == 1 else 1 + bucket(longest - 1, least=8)
    rows = self._row_count(len(requests))
    targets, counts = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    context_A = np.zeros(rows, np.int32)
    for r, (context, continuation) in enumerate(requests):
      targets[r, : len(continuation)] = continuation
      counts[r], context_A[r] = len(continuation), index[tuple(context)]
    with self.on_mesh():
      out = score(self.params, tokens, lengths, context_A, targets, counts, config=self.config)
      log_probs, greedy = np.asarray(out.log_probs_AW), np.asarray(out.greedy_AW)
    self._note_drops(out.drops)
    for (_, continuation), p, g in zip(requests, log_probs, greedy, strict=False):
      n = len(continuation)
      token_log_probs = tuple(p[:n].tolist())
      yield Score(float(p[:n].sum(dtype=np.float64)), token_log_probs, bool(g[:n].all()))

  # --- batches

  def _padded(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [b, t], lengths [b]) in the shape of a bucket; rows of padding have length 0."""
    length = bucket(max(map(len, rows)), self.max_length)
    tokens = np.zeros((self._row_count(len(rows)), length), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for i, row in enumerate(rows):
      tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths

  def _row_count(self, rows: int) -> int:
    """The next power of two that the mesh divides."""
    shards = 1
    if self.mesh is not None:
      shards = self.mesh.shape[partitioning.DATA] * self.mesh.shape[partitioning.EXPERT]
    return max(1 << (rows - 1).bit_length(), 1) if shards == 1 else -(-rows // shards) * shards

  def check_ids(self, what: str, ids: Sequence[int]) -> None:
    """Raises ConfigError where a token is not in the model's vocabulary."""
    wrong = [i for i in ids if not 0 <= i < self.config.vocab_size]
    if wrong:
      raise ConfigError(
        f'{what} has the token {wrong[0]}; {self.name} has vocab_size={self.config.vocab_size}. '
        f'Encode it with the vocabulary of this model.'
      )

  def _check_length(self, what: str, length: int, remedy: str) -> None:
    if length > self.max_length:
      raise ConfigError(
        f'{what} needs {length} tokens with the one that begins a sequence, more than '
        f'max_length={self.max_length} of {self.name}: {remedy}, or load the model with a larger '
        f'max_length.'
      )

  def _note_drops(self, drops: Drops) -> None:
    if self.config.moe is None or self.config.moe.dispatch is Dispatch.DROPLESS:
      return
    dropped, routed = float(drops.dropped), float(drops.routed)
    self._dropped, self._routed = self._dropped + dropped, self._routed + routed
    if dropped and not self._warned:
      # Once, with a text that stays the same: how much was dropped is in dropped_fraction.
      self._warned = True
      warnings.warn(
        f'{self.name} routes with capacity, and choices of experts found no slot, so what a prompt '
        f'gives depends on its neighbours (dropped_fraction says how many). Load the model without '
        f'capacity for results of its own.',
        CapacityWarning,
        stacklevel=3,
      )
