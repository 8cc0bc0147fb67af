"""Recording: documents through a model, into a record on disk.

One straight line: documents become rows of at most `length` tokens, rows become calls, and what a
call shows of a document's tokens goes to the writer. In memory are one call and one part.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from openmoe.atlas.forward import Calls, Forward, Observed, routers_of, slots_of
from openmoe.atlas.record import ATTENTION, COLUMNS, OPTIONAL, PART_TOKENS, Document, Header, Writer
from openmoe.config import ConfigError, RouterOrder
from openmoe.inference.model import LanguageModel

_NEED_PROBS = 256  # experts up to which all probabilities are kept by default


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a recording is.

  Attributes:
    tokens, documents: recorded.
    share: of all, or None where nobody knows how much there is.
    rate: tokens per second of this start.
    left: seconds, or None.
  """

  tokens: int
  documents: int
  share: float | None
  rate: float
  left: float | None


class Clock:
  """Progress of a recording that may have begun before.

  Args:
    most_tokens, documents: how much there is, where known.
  """

  def __init__(self, before: int, most_tokens: int | None, documents: int | None):
    self._before, self._most, self._documents = before, most_tokens, documents
    self._began = time.monotonic()

  def at(self, tokens: int, documents: int) -> Progress:
    """Progress now."""
    seconds = max(time.monotonic() - self._began, 1e-9)
    shares = [tokens / self._most] if self._most else []
    shares += [documents / self._documents] if self._documents else []
    share = min(1.0, max(shares)) if shares else None
    rate = (tokens - self._before) / seconds
    new = (tokens - self._before) / max(tokens, 1)  # of what is there, what this start did
    left = None
    if share and new:
      left = seconds * (1 - share) / (share * new)
    return Progress(tokens, documents, share, rate, left)


def rows_of(document: Document, start_id: int, length: int) -> list[list[int]]:
  """A document as rows that begin with start_id; what does not fit goes on in a further row."""
  tokens, room = [int(token) for token in document.tokens], length - 1
  return [[start_id, *tokens[at : at + room]] for at in range(0, max(len(tokens), 1), room)]


def limited(documents: Iterable[Document], most_tokens: int | None) -> Iterator[Document]:
  """Documents until so many tokens are there, those that begin rows aside; the last one is cut."""
  left = most_tokens
  for document in documents:
    if not len(document.tokens):
      continue
    if left is None:
      yield document
      continue
    if left <= 0:
      return
    kept = document.tokens[:left]
    left -= len(kept)
    yield dataclasses.replace(document, tokens=kept)


def header_of(
  model: LanguageModel,
  forward: Forward,
  calls: Calls,
  columns: Sequence[str],
  about: Mapping[str, Any],
) -> Header:
  """What a recording with these settings is of.

  Args:
    about: further fields: step, tokens_seen, tokenizer, sources, override, commit.
  """
  config = forward.config
  group_size, capacity = slots_of(config, calls)
  mesh = model.mesh
  return Header(
    model=model.name.removesuffix('*'),
    checkpoint=model.fingerprint,
    vocab_size=config.vocab_size,
    num_experts=config.moe.num_experts,
    top_k=config.moe.top_k,
    routers=routers_of(config),
    length=calls.length,
    rows=forward.rows,
    dtype=config.dtype,
    dispatch=config.moe.dispatch.value,
    start_id=model.start_id,
    group_size=group_size,
    capacity=capacity,
    capacity_factor=None if capacity is None else config.moe.eval_capacity_factor,
    ignore_padding=config.moe.ignore_padding,
    # A row alone on its device, in a shape of its own: nothing that is computed sees another.
    independent=capacity is None and (mesh is None or mesh.shape['expert'] == 1),
    weights_sum_to_one=config.moe.router_order is RouterOrder.TOP_K_SOFTMAX,
    columns=tuple(columns),
    **about,
  )


def record(
  model: LanguageModel,
  documents: Iterable[Document],
  out: str,
  calls: Calls = Calls(),
  *,
  about: Mapping[str, Any],
  probs: bool | None = None,
  attention: bool = True,
  most_tokens: int | None = None,
  count: int | None = None,
  show: Callable[[Progress], None] = lambda progress: None,
) -> Writer:
  """Records documents; a record that was broken off goes on.

  Args:
    documents: in an order that is the same each time.
    out: folder of the record.
    about: see header_of().
    probs: keep all probabilities of the routers; None where there are few experts.
    attention: of a JetMoE, keep what attention experts look at.
    most_tokens: stop after so many tokens.
    count: documents there are, to tell the time that is left.
    show: called from time to time.

  Raises:
    ConfigError: `out` is a record of something else, or there is no document.
  """
  if probs is None:
    probs = model.trained_config.moe is not None and (
      model.trained_config.moe.num_experts <= _NEED_PROBS
    )
  forward = Forward(model, calls, with_probs=probs, with_attention=attention)
  has_attention = attention and any(r.kind == ATTENTION for r in routers_of(forward.config))
  header = header_of(model, forward, calls, columns_of(probs, has_attention), about)
  return write(forward, documents, Writer(out, header), model.vocabulary, most_tokens, count, show)


def columns_of(probs: bool, attention: bool) -> list[str]:
  """Columns of a record with or without the optional ones."""
  skipped = [n for n, has in zip(OPTIONAL, (probs, attention), strict=True) if not has]
  return [name for name in COLUMNS if name not in skipped]


def write(
  forward: Callable[[Sequence[Sequence[int]]], Observed],
  documents: Iterable[Document],
  writer: Writer,
  vocabulary: Any,
  most_tokens: int | None = None,
  count: int | None = None,
  show: Callable[[Progress], None] = lambda progress: None,
) -> Writer:
  """Observes documents and writes down what is seen; see record().

  Args:
    forward: observes at most forward.rows rows.
    vocabulary: gives the texts of tokens.

  Raises:
    ConfigError: there is no document.
  """
  if writer.complete:
    return writer
  start_id, length = writer.header.start_id, writer.header.length
  clock, used = Clock(writer.tokens, most_tokens, count), {start_id}
  before = writer.documents

  def noted() -> Iterator[Document]:
    """Documents that are not recorded yet; all of them count in the digest."""
    for number, document in enumerate(limited(documents, most_tokens)):
      writer.digest(document)
      used.update(map(int, document.tokens))
      if number >= before:
        yield document

  for batch in grouped(noted(), forward.rows, start_id, length):
    for document, found in _observed(forward, batch, writer.documents):
      slot, capacity = found['slot'], writer.header.capacity
      lost = np.zeros(slot.shape, bool) if capacity is None else slot >= capacity
      writer.add(document, found | {'dropped': lost.astype(np.uint8)})
    writer.flush(PART_TOKENS)
    if jax.process_index() == 0:
      show(clock.at(writer.tokens, writer.documents))
  if not writer.documents:
    raise ConfigError('There is no document with a token in the data; check --data and its fields.')
  writer.finish(token_texts(vocabulary, sorted(used)))
  return writer


Batch = list[tuple[Document, list[list[int]]]]


def grouped(
  documents: Iterable[Document], rows: int, start_id: int, length: int
) -> Iterator[Batch]:
  """Documents with their rows, those together whose rows fit into one call.

  A document of more rows than a call has is by itself, in several calls.
  """
  waiting: Batch = []
  for document in documents:
    mine = rows_of(document, start_id, length)
    if waiting and sum(len(r) for _, r in waiting) + len(mine) > rows:
      yield waiting
      waiting = []
    waiting.append((document, mine))
  if waiting:
    yield waiting


def _observed(
  forward: Callable[[Sequence[Sequence[int]]], Observed], waiting: Batch, first: int
) -> Iterator[tuple[Document, dict[str, np.ndarray]]]:
  """The columns of each document: its rows in calls of forward.rows, beginning with a new call."""
  owners = [i for i, (_, rows) in enumerate(waiting) for _ in rows]
  rows = [row for _, of_document in waiting for row in of_document]
  found: list[list[dict[str, np.ndarray]]] = [[] for _ in waiting]
  for at in range(0, len(rows), forward.rows):
    some = rows[at : at + forward.rows]
    seen = forward(some)
    for i, row in enumerate(some):
      owner = owners[at + i]
      columns = _columns(seen, i, row)
      columns['document'] = np.full(len(row), first + owner, np.int32)
      columns['piece'] = np.full(len(row), len(found[owner]), np.int32)
      found[owner].append(columns)
  for (document, _), pieces in zip(waiting, found, strict=True):
    yield document, {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}


def _columns(seen: Observed, i: int, row: Sequence[int]) -> dict[str, np.ndarray]:
  """What a call showed of its i-th row."""
  b, t = seen.predicted_bt.shape
  count = len(row)
  mine = lambda x: np.moveaxis(x.reshape(x.shape[0], b, t, *x.shape[2:])[:, i, :count], 0, 1)
  tokens = np.asarray(row, np.int32)
  found = {
    'position': np.arange(count, dtype=np.int32),
    'token_id': tokens,
    'next_id': np.append(tokens[1:], -1).astype(np.int32),
    'predicted_id': seen.predicted_bt[i, :count],
    'next_log_prob': seen.next_log_prob_bt[i, :count],
    'expert': mine(seen.expert_RNk),
    'weight': mine(seen.weight_RNk),
    'slot': mine(seen.slot_RNk),
    'lse': mine(seen.lse_RN),
    'entropy': mine(seen.entropy_RN),
    'margin': mine(seen.margin_RN),
  }
  if seen.probs_RNe is not None:
    found['probs'] = mine(seen.probs_RNe)
  if seen.attention_AbtkB is not None:
    found['attention'] = np.moveaxis(seen.attention_AbtkB[:, i, :count], 0, 1)
  return found


def token_texts(vocabulary: Any, tokens: Sequence[int]) -> dict[int, str]:
  """The text of each token as it stands behind another, so that a word's space is seen."""
  before = list(vocabulary.encode('a'))
  head = vocabulary.decode(before)
  found = {}
  for token in tokens:
    text = vocabulary.decode([*before, token])
    text = text.removeprefix(head) if text.startswith(head) else vocabulary.decode([token])
    found[token] = text or f'<{token}>'
  return found
