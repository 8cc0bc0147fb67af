"""What seqio and t5x ask of our tasks: metrics, numbers of examples, lengths, cached folders."""

from __future__ import annotations

import json

import pytest
import seqio

from openmoe.config import ConfigError
from openmoe.data.sources import TextFiles
from openmoe.data.tfds_source import TfdsDocuments
from tasks.bigbench import lite
from tasks.evaluation import catalogue
from tests.data import case as data_case
from tests.tasks import benchmark_case, bigbench_case

VOCABULARY = seqio.ByteVocabulary()


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory) -> str:
  folder = tmp_path_factory.mktemp('benchmarks')
  for name, records in benchmark_case.DATA.items():
    path = folder / f'{name}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(map(json.dumps, records)))
  return str(folder)


def evaluated(name: str, split: str, answer, judge) -> dict:
  """Metrics of seqio.Evaluator where every row is answered so."""
  evaluator = seqio.Evaluator(
    name, seqio.DecoderFeatureConverter(pack=False), eval_split=split, sequence_length=None
  )
  assert len(evaluator.eval_tasks) == 1

  def predict(dataset, **_):
    return [(i, list(VOCABULARY.encode(answer))) for i, _ in dataset.as_numpy_iterator()]

  def score(dataset, **_):
    return [(i, judge(x)) for i, x in dataset.as_numpy_iterator()]

  found, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=score, step=0)
  (metrics,) = found.result().values()
  return metrics


def target_of(row) -> str:
  """The text that a row scores."""
  tokens = row['decoder_target_tokens'][row['decoder_loss_weights'] > 0]
  return VOCABULARY.decode(tokens.tolist())


def nothing(row) -> float:
  return 0.0


def test_generated_benchmarks_have_their_figures(data_dir):
  name = catalogue.register('triviaqa', 'fixed', data_dir, VOCABULARY)
  assert evaluated(name, 'test', 'The Y.', nothing) == {'em': 1.0, 'f1': 1.0}
  assert evaluated(name, 'test', 'Zed', nothing) == {'em': 0.0, 'f1': 0.0}


def test_ranked_benchmarks_have_their_figures(data_dir):
  name = catalogue.register('piqa', 'fixed', data_dir, VOCABULARY)
  items = catalogue.BENCHMARKS['piqa']('fixed', None, data_dir).items()
  right = {answer for item in items for answer in item.answers}
  assert not right & {c for i in items for c in i.choices if c not in i.answers}
  for sign, figure in ((1.0, 1.0), (-1.0, 0.0)):
    found = evaluated(name, 'test', '', lambda row, s=sign: s * (target_of(row) in right))
    assert found == dict.fromkeys(('acc', 'acc_norm', 'acc_token'), figure)


def test_the_kind_of_every_benchmark_is_known_before_it_is_read(data_dir):
  for name, make in catalogue.BENCHMARKS.items():
    ranks = bool(make('fixed', None, data_dir).items()[0].choices)
    assert ranks == (name not in catalogue._GENERATED), name


def test_bigbench_has_its_figures(tmp_path):
  bigbench_case.write(tmp_path, 'winowhy', bigbench_case.multiple_choice(6))
  lite.register(tmp_path, ['winowhy'], 1, VOCABULARY)
  name = 'bigbench:winowhy.mul.t5_default_vocab.1_shot.all_examples'
  assert 'multiple_choice_grade' in evaluated(name, 'all', '', nothing)


def test_the_vocabulary_of_another_task_will_do(data_dir, tmp_path):
  data_case.make_corpus(tmp_path, 'lender')
  name = catalogue.register('boolq', 'reference', data_dir, 'lender_ul2')
  features = seqio.TaskRegistry.get(name).output_features
  assert features['targets'].vocabulary == data_case.VOCABULARY


def test_examples_are_counted(tmp_path):
  data_case.make_corpus(tmp_path, 'counted')
  task = seqio.TaskRegistry.get('counted_ul2')
  assert (task.num_input_examples('train'), task.num_input_examples('validation')) == (54, 6)
  for name in ('train', 'validation'):
    rows = task.source.get_dataset(name, shuffle=False).as_numpy_iterator()
    assert sum(1 for _ in rows) == task.num_input_examples(name)
  seqio.MixtureRegistry.add(
    'counted_by_size', ['counted_ul2'], default_rate=seqio.mixing_rate_num_examples
  )
  mixture = seqio.MixtureRegistry.get('counted_by_size')
  assert mixture.num_input_examples('train') == mixture.get_rate(task) == 54
  with pytest.raises(ConfigError, match='No file matches'):
    TextFiles({'train': str(tmp_path / 'none*.jsonl')}).num_input_examples('train')


def test_examples_of_data_that_are_not_there_are_refused_with_the_remedy():
  source = TfdsDocuments('built_by_nobody:1.0.0', {'train': 'train'})
  with pytest.raises(
    ConfigError, match='no TFDS data set built_by_nobody:1.0.0 .* --tfds_data_dir'
  ):
    source.num_input_examples('train')


@pytest.mark.parametrize('suffix', ['', '_reference'])
@pytest.mark.parametrize(
  ('objective', 'lengths', 'words'),
  [
    ('ul2', {'targets': 256}, "UL2 needs both, as {'inputs': 1024"),
    ('ul2', None, "UL2 needs both, as {'inputs': 1024"),
    ('full_lm', None, "needs {'targets': tokens of a row}"),
    ('full_lm', {'inputs': 8}, "needs {'targets': tokens of a row}"),
    ('full_lm', {'inputs': 8, 'targets': 8}, 'has no inputs'),
  ],
)
def test_missing_lengths_are_refused(tmp_path, suffix, objective, lengths, words):
  if 'lengths_ul2' not in seqio.TaskRegistry.names():
    data_case.make_corpus(tmp_path, 'lengths')
  task = seqio.TaskRegistry.get(f'lengths_{objective}{suffix}')
  with pytest.raises(ConfigError) as error:
    task.get_dataset(lengths, split='train')
  assert words in str(error.value)
