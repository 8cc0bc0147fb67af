"""Classification: a rule is learned, saved, opened and judged; and what is refused."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from convert import classifier as folders
from convert import sizes
from convert.formats import hf_jetmoe
from openmoe.checkpoint.checkpointer import Checkpointer, CheckpointError
from openmoe.checkpoint.description import KEY, Description, identity
from openmoe.classification import examples
from openmoe.classification.classifier import Classifier, score
from openmoe.classification.fit import DivergedError, FitConfig, fit, new_head
from openmoe.config import ConfigError
from openmoe.data.vocabulary import train_vocabulary
from openmoe.inference.tokenizer import TextTokenizer
from openmoe.models import abstract_params
from openmoe.train_step import TrainState
from scripts import classify

WORDS = ('red', 'green', 'blue', 'grey')
CONFIG = dataclasses.replace(
  sizes.of_told(
    hf_jetmoe.sizes({
      'model_type': 'jetmoe', 'vocab_size': 320, 'hidden_size': 16, 'num_hidden_layers': 1,
      'num_key_value_heads': 2, 'kv_channels': 8, 'intermediate_size': 16, 'num_local_experts': 4,
    }),
    'the test',
  ),
  name='classified',
)  # fmt: skip


def write(path, records) -> str:
  path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
  return str(path)


def planted(count: int, seed: int) -> list[dict]:
  """Texts that end in one of two words, which is their label."""
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(count):
    words, last = rng.choice(WORDS, rng.integers(1, 5)), int(rng.integers(2))
    made.append({'text': ' '.join([*words, ('yes', 'no')[last]]), 'label': ('good', 'bad')[last]})
  return made


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A run of random weights, its vocabulary, and records."""
  folder = tmp_path_factory.mktemp('classify')
  train_vocabulary(str(folder / 'spiece.model'), ['red green blue grey yes no of text\n'] * 20, 300)
  rng = np.random.default_rng(0)
  draw = lambda leaf: jax.numpy.asarray(rng.normal(0, 0.2, leaf.shape), 'float32')
  state = TrainState(
    jax.numpy.zeros((), 'int32'), jax.tree.map(draw, abstract_params(CONFIG)[0]), ()
  )
  writer = Checkpointer(folder / 'run', 1, identity(CONFIG))
  writer.save(0, state, {}, {KEY: Description(CONFIG).plain()})
  writer.wait()
  writer.close()
  write(folder / 'train.jsonl', planted(64, 1))
  write(folder / 'test.jsonl', planted(24, 2))
  return folder


@pytest.fixture(scope='module')
def vocabulary(place) -> TextTokenizer:
  return TextTokenizer.open(str(place))


@pytest.fixture(scope='module')
def untrained(vocabulary) -> Classifier:
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
  config = dataclasses.replace(CONFIG, dtype='float32')
  params = {
    'backbone': jax.tree.map(draw, abstract_params(config)[0]),
    'score': new_head(config, 2, 0),
  }
  return Classifier(config, params, ('bad', 'good'), vocabulary, 0, 64)


@pytest.fixture(scope='module')
def trained(untrained, place) -> Classifier:
  records = examples.read(place / 'train.jsonl')
  config = FitConfig(backbone=True, epochs=5, batch_size=16, learning_rate=1e-2)
  return fit(untrained, records, config, lambda line: None)


@pytest.fixture(scope='module')
def saved(trained, place) -> str:
  folders.save(trained, str(place / 'saved'))
  return str(place / 'saved')


def test_a_planted_rule_is_learned_and_kept_bit_for_bit(trained, saved, place, capsys):
  records = examples.read(place / 'test.jsonl')
  texts = [record.text for record in records]
  opened = folders.open_classifier(saved)
  assert opened.labels == ('bad', 'good') and opened.max_length == 64
  before = trained.probabilities(texts)
  np.testing.assert_array_equal(opened.probabilities(texts), before)
  assert classify.main(['evaluate', f'--classifier={saved}', f'--data={place}/test.jsonl']) == 0
  assert capsys.readouterr().out == 'accuracy 1.0000\nmacro-F1 1.0000\nrecords 24\n'
  out = place / 'predicted.jsonl'
  command = ['predict', f'--classifier={saved}', f'--data={place}/test.jsonl', f'--out={out}']
  assert classify.main(command) == 0
  lines = [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]
  assert [line['label'] for line in lines] == [record.label for record in records]
  assert [list(line['probabilities'].values()) for line in lines] == before.tolist()


def test_the_command_trains_a_head_and_leaves_the_backbone(place, capsys):
  out = place / 'head'
  command = ['train', f'--checkpoint={place}/run', f'--vocabulary={place}', f'--out={out}']
  command += [f'--data={place}/train.jsonl', '--epochs=2', '--batch_size=64', '--max_length=16']
  assert classify.main(command) == 0, capsys.readouterr().err
  said = capsys.readouterr().out
  assert 'epoch 2 of 2: loss' in said and '2 labels from 64 records' in said
  opened = folders.open_classifier(str(out))
  reader = Checkpointer(place / 'run', 1, identity(CONFIG), read_only=True)
  backbone = reader.restore_params(0, abstract_params(CONFIG)[0])
  reader.close()
  jax.tree.map(np.testing.assert_array_equal, opened.params['backbone'], backbone)
  head = new_head(opened.config, 2, 0)['kernel']
  assert np.abs(opened.params['score']['kernel'] - head).max() > 1e-4
  assert classify.main(command) == 64
  assert 'head exists already; give a new folder.' in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_training(untrained, place):
  params = untrained.params | {'score': {'kernel': np.full((16, 2), np.nan, np.float32)}}
  broken = dataclasses.replace(untrained, params=params)
  config = FitConfig(epochs=1, batch_size=64)
  with pytest.raises(DivergedError, match='loss of step 1 is nan; lower --learning_rate'):
    fit(broken, examples.read(place / 'train.jsonl'), config)


GOOD = {'text': 'a', 'label': 'x'}


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ([1], 'the record is no JSON object'),
    ({'label': 'x'}, 'the record has no text; add it'),
    ({'text': 'a'}, 'the record has no label; add it'),
    ({'text': 3, 'label': 'x'}, 'text is 3; a text in quotes'),
    ({'text': 'a', 'label': None}, 'label is None; a text that is not empty or a whole number'),
    ({'text': 'a', 'label': 0.5}, 'label is 0.5'),
    ({'text': 'a', 'label': True}, 'label is True'),
    ({'text': 'a', 'label': ''}, "label is ''"),
    ({'text': 'a', 'label': 1}, "label 1 and label 'x' of .*:1 are of two kinds"),
  ],
)
def test_wrong_records_are_refused_by_file_and_line(wrong, message, tmp_path):
  path = write(tmp_path / 'a.jsonl', [GOOD, wrong])
  with pytest.raises(ConfigError, match=rf'a\.jsonl:2: .*{message}') as error:
    examples.read(path)
  assert error.value.exit_code == 65


def test_files_and_labels_that_cannot_be_used_are_refused(tmp_path):
  with pytest.raises(ConfigError, match='has no records'):
    examples.read(write(tmp_path / 'none.jsonl', []))
  records = examples.read(write(tmp_path / 'one.jsonl', [GOOD, GOOD]))
  with pytest.raises(ConfigError, match="All 2 records have the label 'x'"):
    examples.labels_of(records)
  with pytest.raises(
    ConfigError, match=r"one\.jsonl:1: label 'x' is none of the 2 that .*'y', 'z'"
  ):
    examples.classes(records, ('y', 'z'))
  numbers = examples.read(write(tmp_path / 'n.jsonl', [GOOD | {'label': i} for i in (10, 9, 10)]))
  assert examples.labels_of(numbers) == (9, 10)
  assert examples.classes(numbers, (9, 10)) == [1, 0, 1]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'labels': ['good', 'bad']}, r"labels are .* but the weights are of \['bad', 'good'\]"),
    ({'labels': ['good']}, 'labels must be two or more'),
    ({'labels': ['a', 1]}, 'labels must be two or more'),
    ({'labels': ['a', 'a']}, 'a label is there more than once'),
    ({'labels': 'ab'}, "labels is 'ab'; a list belongs there"),
  ],
)
def test_folders_that_were_changed_are_refused(change, message, saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / 'copy')
  facts = json.loads((folder / folders.FILE).read_text(encoding='utf-8'))
  (folder / folders.FILE).write_text(json.dumps(facts | change), encoding='utf-8')
  with pytest.raises(Exception, match=message) as error:
    folders.open_classifier(str(folder))
  assert error.value.exit_code in (64, 65)


def test_what_is_no_classifier_is_refused(tmp_path, saved, trained, monkeypatch, capsys):
  command = ['evaluate', f'--classifier={tmp_path}', f'--data={tmp_path}/a.jsonl']
  write(tmp_path / 'a.jsonl', [GOOD])
  assert classify.main(command) == 64
  assert 'is no classifier: it has neither classifier.json nor' in capsys.readouterr().err
  with pytest.raises(ConfigError, match='saved exists already'):
    folders.save(trained, saved)
  with pytest.raises(ConfigError, match='is remote'):
    folders.check_free('gs://bucket/a')

  def full(*unused):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(folders.os, 'rename', full)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(CheckpointError, match='could not be written'):
    folders.save(trained, str(tmp_path / 'empty' / 'b'))
  assert not list((tmp_path / 'empty').iterdir())


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--max_length=1', 'max_length=1 must be in 2..'),
    ('--epochs=0', 'epochs=0 must be more than 0'),
    ('--batch_size=0', 'batch_size=0 must be more than 0'),
    ('--learning_rate=nan', 'learning_rate=nan must be more than 0'),
    ('--seed=-1', 'seed=-1 must be in 0..'),
    ('--data=absent.jsonl', 'absent.jsonl'),
    ('--checkpoint=absent', 'absent does not exist'),
  ],
)
def test_values_that_cannot_be_are_refused_before_work(flag, message, place, tmp_path, capsys):
  command = ['train', f'--checkpoint={place}/run', f'--vocabulary={place}', f'--out={tmp_path}/o']
  assert classify.main([*command, f'--data={place}/train.jsonl', flag]) == 64
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_scores_of_guesses():
  # By hand: F1 of 0 is 1/2, of 1 is 4/5, and 2 is never right.
  assert score([0, 0, 1, 1, 2], [0, 1, 1, 1, 0]).accuracy == pytest.approx(0.6)
  assert score([0, 0, 1, 1, 2], [0, 1, 1, 1, 0]).macro_f1 == pytest.approx((1 / 2 + 4 / 5) / 3)
  assert score([0, 0], [0, 0]).macro_f1 == 1.0


def test_weights_that_are_no_numbers_give_no_class(untrained):
  broken = dataclasses.replace(untrained)
  broken.__dict__['_run'] = lambda params, batch: SimpleNamespace(
    logits_bY=np.where(np.arange(16)[:, None] == 1, np.nan, np.zeros((16, len(untrained.labels))))
  )
  with pytest.raises(ConfigError, match='gives text 3 logits that are not finite: its weights'):
    broken.probabilities(['a', 'b b b', 'c'])
