"""The tokenizer of a folder or file: SentencePiece models, or a tokenizer.json."""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable, read_small
from openmoe.config import ConfigError

MODELS = ('spiece.model', 'sentencepiece.model', 'sentencepiece.bpe.model', 'tokenizer.model')
_LARGEST = 64 << 20
_BYTES = 256


class Source(NamedTuple):
  """What a tokenizer is made of, as TextTokenizer.of takes it."""

  kind: str
  content: bytes
  extra_ids: int = 0


class TextTokenizer:
  """What openmoe.inference.model.TextVocabulary asks for; adds no tokens of its own to a text.

  Args:
    encode, decode: of text without added tokens.
    size: ids that have a piece.
    eos_id: ends a text.
    content: of the file, for the fingerprint.
    source: what another such tokenizer can be made of.
    is_byte: whether an id is one byte of a character.
    added: tokens that were added to the tokenizer: text -> id.
  """

  pad_id = 0

  def __init__(
    self,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[list[int]], str],
    size: int,
    eos_id: int,
    content: bytes,
    source: Source,
    is_byte: Callable[[int], bool] = lambda token: False,
    added: Mapping[str, int] | None = None,
  ):
    self._encode, self._decode, self._size, self._content = encode, decode, size, content
    self.eos_id, self.source, self._is_byte = eos_id, source, is_byte
    self.added = dict(added or {})
    self._of_id = {i: text for text, i in self.added.items()}
    # Longest first, so that a token goes before another that it begins with.
    names = sorted(map(re.escape, self.added), key=len, reverse=True)
    self._split = re.compile(f'({"|".join(names)})') if names else None

  @classmethod
  def open(cls, path: str, eos_id: int | None = None) -> TextTokenizer:
    """Reads a model file, or the one in a folder.

    Raises:
      ConfigError: there is none, or reading it needs a package that is not installed.
    """
    place = pathlib.Path(path)
    kind, file, content = read_tokenizer(path)
    added = added_tokens(place) if place.is_dir() and kind == 'sentencepiece' else {}
    return cls.of(kind, content, str(file), eos_id, added=added)

  @classmethod
  def of(
    cls,
    kind: str,
    content: bytes,
    where: str,
    eos_id: int | None = None,
    extra_ids: int = 0,
    added: Mapping[str, int] | None = None,
  ) -> TextTokenizer:
    """A tokenizer from the content of its file.

    Args:
      kind: 'sentencepiece' or 'tokenizer.json'.
      where: what messages call it.
      extra_ids: sentinels behind the pieces, <extra_id_0> last, as seqio has them.

    Raises:
      ConfigError: it cannot be read, or needs a package that is not installed.
    """
    if kind == 'tokenizer.json':
      return _from_json(content, where, eos_id)
    return _from_model(content, where, eos_id, extra_ids, added)

  def encode(self, text: str) -> list[int]:
    if self._split is None:
      return list(self._encode(text))
    ids: list[int] = []
    for piece in self._split.split(text):
      ids += [self.added[piece]] if piece in self.added else self._encode(piece) if piece else []
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Ids without a piece (an output layer is wider than its vocabulary) are left out."""
    if not self._of_id:
      return self._decode([int(i) for i in ids if 0 <= i < self._size])
    text, run = '', []
    for token in (*map(int, ids), None):
      if token is None or token in self._of_id:
        text += self._decode(run) if run else ''
        text, run = text + self._of_id.get(token, ''), []
      elif 0 <= token < self._size:
        run.append(token)
    return text

  def is_byte(self, token: int) -> bool:
    """Whether a token is one byte of a character, which others may change."""
    return self._is_byte(token)

  def fingerprint(self) -> str:
    """Tells tokenizers apart by content."""
    content = self._content + repr(sorted(self.added.items())).encode() * bool(self.added)
    return hashlib.sha256(content).hexdigest()[:16]


def read_tokenizer(path: str) -> tuple[str, pathlib.Path, bytes]:
  """(kind, file, content) of a tokenizer's file, or of the one in a folder.

  Raises:
    ConfigError: there is none, or it cannot be read.
  """
  place = pathlib.Path(path)
  names = [place / name for name in (*MODELS, 'tokenizer.json')] if place.is_dir() else [place]
  file = next((name for name in names if name.is_file()), None)
  if file is None:
    raise ConfigError(
      f'{path} has no tokenizer: none of {[*MODELS, "tokenizer.json"]} is there. Copy it into '
      'the folder, or give the file, vocabulary=PATH (--vocabulary=PATH).'
    )
  try:
    content = read_small(file, _LARGEST)
  except (OSError, Unreadable) as error:
    raise ConfigError(f'{file} cannot be read: {error}') from error
  return 'tokenizer.json' if file.suffix == '.json' else 'sentencepiece', file, content


def added_tokens(folder: pathlib.Path) -> dict[str, int]:
  """Tokens that were added beside a SentencePiece model: text -> id.

  Raises:
    ConfigError: a file of them cannot be read, or holds something else.
  """
  found: dict[str, int] = {}
  for name in ('added_tokens.json', 'tokenizer_config.json'):
    path = folder / name
    if not path.is_file():
      continue
    try:
      facts = safe_json.read(path)
    except (OSError, Unreadable) as error:
      raise ConfigError(f'{path} cannot be read: {error}') from error
    if name == 'added_tokens.json':
      pairs = list(facts.items())
    else:
      told = facts.get('added_tokens_decoder') or {}
      told = told if isinstance(told, dict) else {}
      named = lambda value: value.get('content') if isinstance(value, dict) else value
      number = lambda key: int(key) if key.isdigit() else key
      pairs = [(named(value), number(key)) for key, value in told.items()]
    for text, token in pairs:
      if not (isinstance(text, str) and text and type(token) is int):
        raise ConfigError(f'{path}: the added token {text!r}: {token!r} is no text with an id.')
      found[text] = token
  return found


def byte_tokenizer(extra_ids: int, eos_id: int) -> TextTokenizer:
  """seqio's ByteVocabulary: ids 0 to 2 are special, 3 to 258 bytes."""
  # Sentinels have no text.
  encode = lambda text: [byte + 3 for byte in text.encode()]
  decode = lambda ids: bytes(i - 3 for i in ids if i >= 3).decode('utf-8', 'ignore')
  is_byte = lambda token: 3 <= token < _BYTES + 3
  source = Source('bytes', b'', extra_ids)
  return TextTokenizer(encode, decode, _BYTES + 3, eos_id, b'bytes', source, is_byte)


def _from_model(
  content: bytes, where: str, eos_id: int | None, extra_ids: int, added: Mapping[str, int] | None
) -> TextTokenizer:
  source, given = Source('sentencepiece', content, extra_ids), content
  try:
    if extra_ids:
      content = _with_sentinels(content, extra_ids)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f'{where} is not a SentencePiece model ({len(given):,} bytes, beginning {given[:24]!r}): '
      f'{error}; download it again.'
    ) from error
  eos = pieces.eos_id() if eos_id is None else eos_id
  size = pieces.get_piece_size()
  if not size:
    raise ConfigError(f'{where} is not a SentencePiece model: it has no pieces; copy it again.')
  own = {text: i for text, i in (added or {}).items() if i >= size}
  is_byte = lambda token: token < size and pieces.is_byte(token)
  return TextTokenizer(pieces.encode, pieces.decode, size, eos, content, source, is_byte, own)


def _with_sentinels(content: bytes, extra_ids: int) -> bytes:
  """A model with the sentinels behind its pieces, as seqio.SentencePieceVocabulary adds them."""
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(content)
  for number in reversed(range(extra_ids)):
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    proto.pieces.add(piece=f'\u2581<extra_id_{number}>', score=0.0, type=kind)
  return proto.SerializeToString()


def _from_json(content: bytes, where: str, eos_id: int | None) -> TextTokenizer:
  try:
    import tokenizers
  except ImportError as error:
    raise ConfigError(
      f'{where} needs the package tokenizers: install the `torch` extra, or put a SentencePiece '
      f'model ({", ".join(MODELS)}) beside it.'
    ) from error
  if eos_id is None:
    raise ConfigError(f'{where} does not say which token ends a text; give a SentencePiece model.')
  try:
    fast = tokenizers.Tokenizer.from_str(content.decode('utf-8'))
  # The library raises plain Exception for whatever it does not like in a file.
  except Exception as error:
    raise ConfigError(f'{where} is no tokenizer.json: {str(error)[:200]!r}') from error
  encode = lambda text: fast.encode(text, add_special_tokens=False).ids
  is_byte = lambda token: bool(re.fullmatch('<0x[0-9A-F]{2}>', fast.id_to_token(token) or ''))
  size, source = fast.get_vocab_size(), Source('tokenizer.json', content)
  return TextTokenizer(encode, fast.decode, size, eos_id, content, source, is_byte)
