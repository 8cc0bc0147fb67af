"""SentencePiece vocabularies with sentinels: opening one from a path, training one on the spot.

Ids: 0 padding, 1 EOS, 2 unknown; sentinels are extra ids appended at the end, <extra_id_0> last.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import sentencepiece
import seqio
import tensorflow as tf
from google.protobuf import message as protobuf
from sentencepiece import sentencepiece_model_pb2

from openmoe.checkpoint.paths import write_whole
from openmoe.config import ConfigError
from openmoe.data import files, seqio_private

# umT5's 256000 pieces and 300 sentinels, as in every released run.
UMT5_EXTRA_IDS = 300

# Names under which Hugging Face folders keep their model.
_MODEL_NAMES = (
  'spiece.model',
  'sentencepiece.model',
  'sentencepiece.bpe.model',
  'tokenizer.model',
)


# Normalisation is the identity, but for one code point that is no character and stands in no text:
# with no rule at all every tokenizer TensorFlow makes writes a line to the terminal.
_QUIET_RULE = 'FFFE\tFFFF\n'


class Vocabulary(seqio_private.LazySentencePieceVocabulary):
  """A seqio SentencePiece vocabulary whose file is looked up when it is first used.

  Tasks are registered at import, when nobody has said yet where the data lies; so the path may be
  a function, called at first use.
  """

  def __init__(self, path: str | Callable[[], str], extra_ids: int = UMT5_EXTRA_IDS):
    """Nothing is read yet.

    Args:
      path: a model file, or a folder that holds one (local or gs://), or a function giving it.
      extra_ids: sentinels appended to the pieces.
    """
    super().__init__('', extra_ids=extra_ids)
    self._path = path

  @property
  def sentencepiece_model_file(self) -> str:
    """The model file, found.

    Raises:
      ConfigError: naming the path, when there is none.
    """
    return find_model(self._path() if callable(self._path) else self._path)

  def load_model(self) -> str:
    """The model file, whole.

    Raises:
      ConfigError: it is not there, or no SentencePiece model.
    """
    path = self.sentencepiece_model_file
    check_model_file(path)
    return path

  def check_model(self, pieces) -> None:
    found = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id())
    if found != (0, 1, 2):
      raise ConfigError(
        f'{self.sentencepiece_model_file} has pad, eos, unk = {found}; they must be 0, 1, 2. '
        'Train it with those ids, or choose another model.'
      )

  def __eq__(self, other):
    if not isinstance(other, Vocabulary):
      return False
    return (self._path, self.extra_ids) == (other._path, other.extra_ids)

  def __hash__(self):
    return hash((self._path, self.extra_ids))

  def model_file(self) -> tuple[str, bytes]:
    """(name, content) of a model with the sentinels among its pieces."""
    return _MODEL_NAMES[0], self.sp_model

  def fingerprint(self) -> str:
    """Tells vocabularies apart by content: a hash of pieces and sentinels."""
    return hashlib.sha256(self.sp_model).hexdigest()[:16]


def find_model(path: str) -> str:
  """The SentencePiece model at `path`, a file or a folder with one.

  Raises:
    ConfigError: if there is none.
  """
  if not path:
    raise ConfigError('The vocabulary path is empty; give a SentencePiece model file or folder.')
  if tf.io.gfile.isdir(path):
    for name in _MODEL_NAMES:
      if tf.io.gfile.exists(os.path.join(path, name)):
        return os.path.join(path, name)
    raise ConfigError(f'{path} holds none of {list(_MODEL_NAMES)}; give the model file itself.')
  if not tf.io.gfile.exists(path):
    raise ConfigError(
      f'There is no SentencePiece model at {path}. Copy it there, or give the path of yours.'
    )
  return path


def check_model_file(path: str) -> None:
  """Refuses a file that is no SentencePiece model: a page of an error, JSON, an LFS pointer.

  Raises:
    ConfigError: naming the file.
  """
  content = files.read_bytes(path)
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(content)
    whole = bool(proto.pieces)
  except protobuf.DecodeError:
    whole = False
  if not whole:
    raise ConfigError(
      f'{path} is no SentencePiece model ({len(content):,} bytes, beginning {content[:24]!r}); '
      'give the spiece.model or tokenizer.model itself, downloaded whole.'
    )


class VocabularyFile(NamedTuple):
  """A vocabulary as whoever reads a checkpoint opens it, without seqio.

  Attributes:
    kind: 'sentencepiece', or 'bytes' for seqio's ByteVocabulary, which has no file.
    path: of the model file.
    extra_ids: sentinels behind the pieces.
    content: of the file.
  """

  kind: str
  path: str = ''
  extra_ids: int = 0
  content: bytes = b''


def vocabulary_file(mixture_or_task_name: str) -> VocabularyFile | None:
  """The vocabulary of a task's targets; None for one that only its own code can read.

  Raises:
    ConfigError: its model file is not there.
  """
  task = seqio.get_mixture_or_task(mixture_or_task_name)
  vocabulary = task.output_features['targets'].vocabulary
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return VocabularyFile('bytes', extra_ids=vocabulary.extra_ids)
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return None
  path = vocabulary.sentencepiece_model_file
  with tf.io.gfile.GFile(path, 'rb') as file:
    return VocabularyFile('sentencepiece', path, vocabulary.extra_ids, file.read())


def train_vocabulary(path: str, texts: Iterable[str], pieces: int) -> None:
  """Trains a lossless BPE model and puts it at `path` in one rename.

  Lossless: text comes back exactly, indentation and newlines included, and any byte can be
  encoded. The same texts give the same file.

  Args:
    path: of the model file.
    texts: training text.
    pieces: vocabulary size without sentinels; at least 300 for the bytes and specials.
  """
  folder = os.path.dirname(os.path.abspath(path))
  os.makedirs(folder, exist_ok=True)
  rules = f'{path}.rules{os.getpid()}'
  with open(rules, 'w', encoding='ascii') as f:
    f.write(_QUIET_RULE)
  model = io.BytesIO()
  try:
    _train(iter(texts), model, pieces, rules)
  finally:
    os.remove(rules)
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(model.getvalue())
  # The name of a file that is gone would make equal models differ.
  proto.normalizer_spec.ClearField('normalization_rule_tsv')
  write_whole(path, proto.SerializeToString(deterministic=True))


def _train(texts: Iterator[str], model: io.BytesIO, pieces: int, rules: str) -> None:
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=texts,
    model_writer=model,
    vocab_size=pieces,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_tsv=rules,
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    split_by_whitespace=True,
    user_defined_symbols=['\n'],
    character_coverage=1.0,
    max_sentence_length=1 << 20,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    num_threads=1,
    minloglevel=2,
  )
