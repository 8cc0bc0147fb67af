"""A record of routing: for every token, layer, router and choice what was decided; on disk.

  FOLDER/header.json             what was recorded, of which model, on which data; written first
  FOLDER/part_000000/*.npy       columns of some thousand tokens, memory-mapped when read
  FOLDER/part_000000/documents.json   the documents that begin there
  FOLDER/complete.json           counts and digest; there once the record is whole
  FOLDER/pieces.json             text of every token id that occurs

Columns hold real tokens only; padding is never among them. N tokens, R routers, k choices by rank
(best first), e experts. A part is there whole or not at all, so a record that was broken off goes
on. No pickle; a file that does not fit its header is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openmoe.checkpoint import fields, safe_json
from openmoe.checkpoint.paths import PARTIAL, Unreadable, write_whole
from openmoe.config import ConfigError

FORMAT = 1
HEADER, COMPLETE, PIECES, DOCUMENTS = (
  'header.json', 'complete.json', 'pieces.json', 'documents.json',
)  # fmt: skip
PART_TOKENS = 1 << 15
MLP, ATTENTION = 'mlp', 'attention'
LABELS = ('source', 'domain', 'language')
# Column -> (dtype, axes). N tokens, R routers, k choices, e experts, A attention routers.
COLUMNS = {
  'document': ('<i4', 'N'),  # number of the document in the record
  'piece': ('<i4', 'N'),  # number of the row: a long document is several
  'position': ('<i4', 'N'),  # in the row; 0 is the token that begins it
  'token_id': ('<i4', 'N'),
  'next_id': ('<i4', 'N'),  # the token that follows in the row, -1 at its end
  'predicted_id': ('<i4', 'N'),  # largest logit
  'next_log_prob': ('<f4', 'N'),  # of next_id, natural logarithm; 0 where there is none
  'expert': ('<i2', 'NRk'),
  'weight': ('<f4', 'NRk'),
  'slot': ('<i4', 'NRk'),  # place in the expert's buffer; -1 where the choice is not routed
  'dropped': ('|u1', 'NRk'),  # routed, and found no slot
  'lse': ('<f4', 'NR'),  # logsumexp of the router logits
  'entropy': ('<f4', 'NR'),  # of the router's probabilities, nats
  'margin': ('<f4', 'NR'),  # logit of the last choice less that of the first expert not chosen
  'probs': ('<f2', 'NRe'),
  'attention': ('<f4', 'NAkB'),  # see openmoe.atlas.attention.BEHAVIOUR
}
OPTIONAL = ('probs', 'attention')


@dataclasses.dataclass(frozen=True)
class RouterId:
  """Which router: 0-based layer of the model, and 'mlp' or 'attention'."""

  layer: int
  kind: str

  def __str__(self) -> str:
    return f'{self.kind}.{self.layer}'


@dataclasses.dataclass(frozen=True)
class Header:
  """What a record is of; two records with equal headers hold the same.

  Attributes:
    model: name for people.
    checkpoint: fingerprint of configuration and weights, with interventions if there were any.
    step, tokens_seen: of training, where known.
    tokenizer: digest.
    start_id: the token that begins every row.
    length: longest row, the one that begins it included.
    rows: rows of a call.
    group_size: tokens that compete for slots; None where nothing is dropped.
    capacity: slots of an expert and group; None where nothing is dropped.
    capacity_factor: from which it was made.
    ignore_padding: whether padding was left out of the routing.
    independent: whether a document's record is the same whatever its neighbours are.
    dtype: of activations. dispatch: who moved the rows to the experts.
    weights_sum_to_one: whether a token's combine weights do.
    sources: what was asked for as data.
    override: what was done to the decisions, in words; '' for nothing.
    columns: which there are.
    commit: of this project.
  """

  model: str
  checkpoint: str
  vocab_size: int
  num_experts: int
  top_k: int
  routers: tuple[RouterId, ...]
  tokenizer: str
  length: int
  rows: int
  dtype: str
  dispatch: str
  step: int | None = None
  tokens_seen: int | None = None
  start_id: int = 0
  group_size: int | None = None
  capacity: int | None = None
  capacity_factor: float | None = None
  ignore_padding: bool = True
  independent: bool = False
  weights_sum_to_one: bool = False
  sources: str = ''
  override: str = ''
  columns: tuple[str, ...] = ()
  commit: str = ''
  version: int = FORMAT

  def __post_init__(self):
    if self.version > FORMAT:
      raise ConfigError(
        f'version={self.version}: this project reads records up to {FORMAT}; update it.'
      )
    if not self.routers or not 1 <= self.top_k <= self.num_experts <= 1 << 15:
      raise ConfigError(
        f'{len(self.routers)} routers, top_k={self.top_k}, num_experts={self.num_experts}: there '
        'must be a router, and at least as many experts as choices.'
      )
    wrong = [r.kind for r in self.routers if r.kind not in (MLP, ATTENTION)]
    unknown = sorted(set(self.columns) - set(COLUMNS))
    if wrong or unknown or set(COLUMNS) - set(OPTIONAL) - set(self.columns):
      raise ConfigError(f'columns {list(self.columns)}, kinds {wrong}: not those of a record.')

  def router(self, layer: int, kind: str) -> int:
    """Index of a router."""
    return self.routers.index(RouterId(layer, kind))

  def of_kind(self, kind: str) -> list[int]:
    """Indices of the routers of a kind, by layer."""
    return [i for i, router in enumerate(self.routers) if router.kind == kind]

  def sides(self, tokens: int, behaviours: int) -> dict[str, int]:
    """Length of each axis letter of COLUMNS."""
    attention = len(self.of_kind(ATTENTION))
    known = {'N': tokens, 'R': len(self.routers), 'k': self.top_k, 'e': self.num_experts}
    return known | {'A': attention, 'B': behaviours}


@dataclasses.dataclass(frozen=True)
class Document:
  """A text as tokens.

  Attributes:
    name: file and line, or the like.
    tokens: without the one that begins a row.
    labels: of LABELS; what is missing is ''.
  """

  name: str
  tokens: Sequence[int]
  labels: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Writer:
  """Writes a record; what is there already of the same header is kept.

  Args:
    folder: of the record; made if need be.
    header: of what is recorded.

  Raises:
    ConfigError: something else lies there.
  """

  def __init__(self, folder: str | os.PathLike, header: Header):
    self._folder, self.header = pathlib.Path(folder), header
    self._columns: dict[str, list[np.ndarray]] = {name: [] for name in header.columns}
    self._documents: list[dict[str, Any]] = []
    self._tokens = 0
    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._folder / HEADER
    if path.exists():
      before = read_header(self._folder)
      told, asked = fields.plain(before), fields.plain(header)
      differing = [name for name in asked if name != 'commit' and told[name] != asked[name]]
      if differing:
        raise ConfigError(
          f'{folder} is a record with another {", ".join(differing)}; give another --out.'
        )
    elif any(self._folder.iterdir()):
      raise ConfigError(f'{folder} holds something that is no record; give another --out.')
    else:
      write_whole(path, json.dumps(fields.plain(header), indent=1).encode())
    self.parts = len(_parts(self._folder))
    counts = [_documents(part) for part in _parts(self._folder)]
    self.documents = sum(map(len, counts))
    self.tokens = sum(d['recorded'] for part in counts for d in part)
    self._digest = hashlib.sha256()
    self.complete = (self._folder / COMPLETE).exists()

  def digest(self, document: Document) -> None:
    """Counts a document into the digest of the data; every document, recorded before or not."""
    self._digest.update(json.dumps([document.name, dict(document.labels)]).encode())
    self._digest.update(np.asarray(document.tokens, '<i4').tobytes())

  def add(self, document: Document, columns: Mapping[str, np.ndarray]) -> None:
    """The tokens of one document, all of them at once."""
    count = len(columns['token_id'])
    for name, kept in self._columns.items():
      kept.append(np.ascontiguousarray(columns[name], COLUMNS[name][0]))
    labels = {name: document.labels[name] for name in LABELS if document.labels.get(name)}
    self._documents.append(
      {'name': document.name, 'labels': labels, 'tokens': len(document.tokens), 'recorded': count}
    )
    self._tokens += count
    self.documents += 1
    self.tokens += count

  def flush(self, least: int = 1) -> None:
    """Puts what was added since into a part of its own, if it is so many tokens.

    Between two calls of the model: a recording that goes on begins with a call, as this one would.
    """
    if self._tokens < least:
      return
    final = self._folder / f'part_{self.parts:06d}'
    work = final.with_name(final.name + PARTIAL)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for name, pieces in self._columns.items():
      np.save(work / f'{name}.npy', np.concatenate(pieces), allow_pickle=False)
      pieces.clear()
    (work / DOCUMENTS).write_text(json.dumps(self._documents), encoding='utf-8')
    os.replace(work, final)
    self.parts += 1
    self._documents, self._tokens = [], 0

  def finish(self, pieces: Mapping[int, str]) -> None:
    """Writes what is left, the text of the tokens, and that the record is whole."""
    self.flush()
    texts = {str(token): pieces[token] for token in sorted(pieces)}
    write_whole(self._folder / PIECES, json.dumps(texts).encode())
    done = {'documents': self.documents, 'tokens': self.tokens, 'data': self._digest.hexdigest()}
    write_whole(self._folder / COMPLETE, json.dumps(done, indent=1).encode())
    self.complete = True


# --- reading


def read_header(folder: str | os.PathLike) -> Header:
  """The header of a record.

  Raises:
    ConfigError: it is no record, or damaged.
  """
  path = pathlib.Path(folder) / HEADER
  if not path.is_file():
    raise ConfigError(
      f'{folder} is no record of routing; `python -m scripts.atlas record` makes one.'
    )
  return fields.read(Header, safe_json.read(path), str(path), 'record it again')


def _parts(folder: pathlib.Path) -> list[pathlib.Path]:
  found = sorted(p for p in folder.glob('part_*') if not p.name.endswith(PARTIAL))
  names = [f'part_{i:06d}' for i in range(len(found))]
  if [p.name for p in found] != names:
    raise Unreadable(f'{folder}: a part is missing among {len(found)}; record it again.')
  return found


def _documents(part: pathlib.Path) -> list[dict[str, Any]]:
  path = part / DOCUMENTS
  told = safe_json.read(path, list)
  for one in told:
    for name in ('tokens', 'recorded'):
      safe_json.field(one, name, int, str(path))
    safe_json.field(one, 'name', str, str(path))
    labels = safe_json.field(one, 'labels', dict, str(path))
    if not all(isinstance(text, str) for text in labels.values()):
      raise Unreadable(f'{path}: labels must be texts; record it again.')
  return told


class Part:
  """Some tokens of a record; columns are memory-mapped when first asked for."""

  def __init__(self, path: pathlib.Path, header: Header, tokens: int):
    self._path, self._header, self.tokens = path, header, tokens
    self._known: dict[str, np.ndarray] = {}

  def __getitem__(self, name: str) -> np.ndarray:
    """A column.

    Raises:
      Unreadable: the file does not fit the header.
    """
    if name not in self._known:
      self._known[name] = self._open(name)
    return self._known[name]

  def __contains__(self, name: str) -> bool:
    return name in self._header.columns

  def _open(self, name: str) -> np.ndarray:
    from openmoe.atlas.attention import BEHAVIOUR

    path = self._path / f'{name}.npy'
    dtype, axes = COLUMNS[name]
    sides = self._header.sides(self.tokens, len(BEHAVIOUR))
    shape = tuple(sides[axis] for axis in axes)
    try:
      found = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise Unreadable(f'{path} cannot be read ({error}); record it again.') from error
    if found.shape != shape or found.dtype != np.dtype(dtype):
      raise Unreadable(
        f'{path} holds {found.dtype}{list(found.shape)}; {dtype}{list(shape)} belongs there.'
      )
    limit = {'expert': self._header.num_experts, 'token_id': self._header.vocab_size}
    if name in limit and found.size and not 0 <= found.min() <= found.max() < limit[name]:
      raise Unreadable(f'{path} has values outside 0 to {limit[name] - 1}; record it again.')
    return found


class Record:
  """A whole record, read part by part.

  Attributes:
    header: what it is of.
    tokens, documents: how many.
    data: digest of the documents.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    self.header = read_header(folder)
    path = self.folder / COMPLETE
    if not path.is_file():
      raise ConfigError(
        f'{folder} is not complete: give the command that records it again, and it goes on.'
      )
    done = safe_json.read(path)
    self.data = safe_json.field(done, 'data', str, str(path))
    self.tokens = safe_json.field(done, 'tokens', int, str(path))
    self._parts = _parts(self.folder)
    self._counts = [
      sum(d['recorded'] for d in _documents(part)) for part in self._parts
    ]  # fmt: skip
    self.documents = sum(len(_documents(part)) for part in self._parts)
    if sum(self._counts) != self.tokens or not self.tokens:
      raise Unreadable(
        f'{folder} has {sum(self._counts)} of {self.tokens} tokens; record it again.'
      )

  @property
  def name(self) -> str:
    step = '' if self.header.step is None else f' step {self.header.step}'
    return f'{self.header.model}{"" if step.strip() in self.header.model else step}'

  def parts(self) -> Iterator[Part]:
    """The parts in order."""
    for path, count in zip(self._parts, self._counts, strict=True):
      yield Part(path, self.header, count)

  def describe(self) -> list[dict[str, Any]]:
    """Name, labels and counts of every document."""
    return [one for part in self._parts for one in _documents(part)]

  @functools.cached_property
  def pieces(self) -> dict[int, str]:
    """Text of token ids."""
    path = self.folder / PIECES
    told = safe_json.read(path)
    if not all(name.isdigit() and isinstance(text, str) for name, text in told.items()):
      raise Unreadable(f'{path} must give a text for every token; record it again.')
    return {int(name): text for name, text in told.items()}
