"""Vocabularies: lossless, deterministic, and clear about what is missing."""

from __future__ import annotations

import os

import pytest
import sentencepiece

from openmoe.config import ConfigError
from openmoe.data.vocabulary import Vocabulary, find_model, train_vocabulary

TEXTS = ['def f(x):', '  return  x  # héllo', 'some words of text, and more words'] * 40


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> str:
  path = str(tmp_path_factory.mktemp('vocabulary') / 'deep' / 'spiece.model')
  train_vocabulary(path, TEXTS, 300)
  return path


def test_text_comes_back_exactly(model):
  vocabulary = Vocabulary(model, extra_ids=7)
  for text in (
    '  two  spaces\n\n\tand tabs ',
    'naïve \x00 ﬁ Ａ 漢字 🙂',
    'def f(x):\n  return x\n',
  ):
    ids = vocabulary.encode(text)
    assert vocabulary.tokenizer.decode(ids) == text
    assert vocabulary.encode_tf(text).numpy().tolist() == ids


def test_layout(model):
  vocabulary = Vocabulary(model, extra_ids=7)
  assert vocabulary.vocab_size == 307
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  assert vocabulary.tokenizer.id_to_piece(306).endswith('<extra_id_0>')
  assert vocabulary.tokenizer.id_to_piece(300).endswith('<extra_id_6>')


def test_training_is_deterministic_and_leaves_only_the_model(model, tmp_path):
  train_vocabulary(str(tmp_path / 'again.model'), TEXTS, 300)
  with open(model, 'rb') as first, open(tmp_path / 'again.model', 'rb') as second:
    assert first.read() == second.read()
  assert os.listdir(tmp_path) == ['again.model']


def test_the_path_may_be_a_folder_or_a_function(model):
  folder = os.path.dirname(model)
  assert find_model(folder) == model
  vocabulary = Vocabulary(lambda: folder, 7)
  assert vocabulary.sentencepiece_model_file == model
  assert vocabulary.fingerprint() == Vocabulary(model, 7).fingerprint()
  assert vocabulary.fingerprint() != Vocabulary(model, 8).fingerprint()


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(ConfigError, match=r'no SentencePiece model at .*none.model'):
    _ = Vocabulary(str(tmp_path / 'none.model')).vocab_size
  with pytest.raises(ConfigError, match='holds none of'):
    find_model(str(tmp_path))
  with pytest.raises(ConfigError, match='path is empty'):
    find_model('')


def test_other_special_ids_are_refused(tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / 'm'), vocab_size=27, minloglevel=2
  )
  with pytest.raises(ConfigError, match='must be 0, 1, 2'):
    _ = Vocabulary(str(tmp_path / 'm.model')).vocab_size


def test_equality_is_of_path_and_sentinels():
  assert Vocabulary('a', 5) == Vocabulary('a', 5) != Vocabulary('a', 6)
  assert Vocabulary('a', 5) != Vocabulary('b', 5)
