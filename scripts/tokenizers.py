"""The tokenizer of a folder or file: SentencePiece models, or a tokenizer.json."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence

import sentencepiece

from openmoe.config import ConfigError

MODELS = ('spiece.model', 'sentencepiece.model', 'sentencepiece.bpe.model', 'tokenizer.model')


class TextTokenizer:
  """What openmoe.inference.model.TextVocabulary asks for; adds no tokens of its own to a text."""

  pad_id = 0

  def __init__(
    self,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[list[int]], str],
    size: int,
    eos_id: int,
    content: bytes,
  ):
    self._encode, self._decode, self._size, self._content = encode, decode, size, content
    self.eos_id = eos_id

  @classmethod
  def open(cls, path: str, eos_id: int | None = None) -> TextTokenizer:
    """Reads a model file, or the one in a folder.

    Raises:
      ConfigError: there is none, or reading it needs a package that is not installed.
    """
    place = pathlib.Path(path)
    names = [place / name for name in (*MODELS, 'tokenizer.json')] if place.is_dir() else [place]
    file = next((name for name in names if name.is_file()), None)
    if file is None:
      raise ConfigError(
        f'{path} has no tokenizer: none of {[*MODELS, "tokenizer.json"]} is there. Copy it into '
        'the folder, or give the file, vocabulary=PATH (--vocabulary=PATH).'
      )
    return _from_json(file, eos_id) if file.suffix == '.json' else _from_model(file, eos_id)

  def encode(self, text: str) -> list[int]:
    return list(self._encode(text))

  def decode(self, ids: Sequence[int]) -> str:
    """Ids without a piece (an output layer is wider than its vocabulary) are left out."""
    return self._decode([int(i) for i in ids if 0 <= i < self._size])

  def fingerprint(self) -> str:
    """Tells tokenizers apart by content."""
    return hashlib.sha256(self._content).hexdigest()[:16]


def _from_model(file: pathlib.Path, eos_id: int | None) -> TextTokenizer:
  content = file.read_bytes()
  try:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError as error:
    raise ConfigError(f'{file} is not a SentencePiece model: {error}') from error
  eos = pieces.eos_id() if eos_id is None else eos_id
  return TextTokenizer(pieces.encode, pieces.decode, pieces.get_piece_size(), eos, content)


def _from_json(file: pathlib.Path, eos_id: int | None) -> TextTokenizer:
  try:
    import tokenizers
  except ImportError as error:
    raise ConfigError(
      f'{file} needs the package tokenizers: install the `torch` extra, or put a SentencePiece '
      f'model ({", ".join(MODELS)}) beside it.'
    ) from error
  if eos_id is None:
    raise ConfigError(f'{file} does not say which token ends a text; give a SentencePiece model.')
  fast = tokenizers.Tokenizer.from_file(str(file))
  encode = lambda text: fast.encode(text, add_special_tokens=False).ids
  return TextTokenizer(encode, fast.decode, fast.get_vocab_size(), eos_id, file.read_bytes())
