"""Gin files of t5x, parsed and said in our names."""

from __future__ import annotations

import json

import pytest

from convert.core.tensors import ConvertError
from convert.t5x_gin import places
from convert.t5x_gin.configuration import Configuration
from convert.t5x_gin.parse import Macro, Reference, parse
from convert.t5x_gin.translate import translate
from scripts import import_gin
from tests.convert import t5x_gin_case as case
from tests.parity import t5x_gin as parity

FACTS = json.loads(parity.FACTS.read_text(encoding='utf-8'))


def values(text: str) -> list:
  return [(s.scope, s.name, s.argument, s.value) for s in parse(text, 'f.gin')]


def test_every_form_of_a_statement():
  text = """# A comment
from t5x.contrib.moe import trainer as moe_trainer  # another
import t5.data.mixtures
include "a/b.gin"
A = {"inputs": 1, 'targets': [-2, 3.5e-1, (), (1,), (2)],}
x/y/m.C.argument = %B
m.C:
  one = @s/f.g()
  # inside

  two = ('a'
         "b", None, True)
%s""".replace('%s', 'Z = @f')
  imported, plain, included = parse(text, 'f.gin')[:3]
  assert (imported.name, imported.value) == ('moe_trainer', 't5x.contrib.moe.trainer')
  assert (plain.name, plain.value) == ('t5', 't5')
  assert included.name == 'a/b.gin'
  assert values(text)[3:] == [
    ('', 'A', '', {'inputs': 1, 'targets': [-2, 0.35, (), (1,), 2]}),
    ('x/y', 'm.C', 'argument', Macro('B')),
    ('', 'm.C', 'one', Reference('s', 'f.g', True)),
    ('', 'm.C', 'two', ('ab', None, True)),
    ('', 'Z', '', Reference('', 'f', False)),
  ]


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('A = 1 2', "f.gin line 1: '2' where the end of the statement belongs"),
    ('A =', 'where a value belongs'),
    ("A = 'x", 'f.gin'),  # the tokenizer's words, which change with Python
    ('A = [1', 'f.gin'),
    ('A = {1: 2, 3}', "where ':' belongs"),
    ('A = {[1]: 2}', 'a key that can be compared'),
    ('A = __import__("os").system("true")', 'where a value belongs'),
    ('include here', 'a text in quotes'),
    ('m.C:\n  one 1', "where '=' belongs"),
    ('A = ' + '[' * 5000 + ']' * 5000, 'f.gin'),
    ('1 = 2', 'where a name belongs'),
  ],
)
def test_what_is_no_gin_file_is_refused_with_its_line(text, words):
  with pytest.raises(ConvertError, match='f.gin') as error:
    parse(text, 'f.gin')
  assert words in str(error.value)


@pytest.mark.parametrize('name', parity.FILES)
def test_the_originals_macros_yield_our_configurations(name, tmp_path):
  path = case.write(tmp_path, name, FACTS[name])
  text = parity.translated(str(path), f'--gin_search_paths={tmp_path}')
  assert parity.differences(name, text) == []


def test_a_changed_macro_is_seen(tmp_path):
  macros = FACTS['openmoe_base'] | {'NUM_SELECTED_EXPERTS': 1}
  path = case.write(tmp_path, 'openmoe_base', macros)
  text = parity.translated(str(path), f'--gin_search_paths={tmp_path}')
  assert parity.differences('openmoe_base', text) == ['model.moe.top_k: 1 there, 2 here']


def told(tmp_path, more: str):
  path = case.write(tmp_path, 'mine', FACTS['openmoe_large'], more)
  return translate(Configuration([str(path)], [str(tmp_path)]), 'mine')


@pytest.mark.parametrize(
  ('more', 'words'),
  [
    ('models.MoeDecoderOnlyModel.label_smoothing = 0.1', 'always 0'),
    ('dense.MlpBlock.use_bias = True', 'always False'),
    ('EXPERT_MLP_DIM = 5', 'config.ModelConfig.mlp_dim is one value here'),
    ("factors = 'constant * linear_warmup'", 'schedule'),
    ('utils.SaveCheckpointConfig.checkpoint_steps = (1, 2)', 'no counterpart'),
    ('moe_layers.MoeLayer.num_experts = @f()', 'takes a value'),
    ('moe_architecture.SparseDecoderLayer.extra_mlp = None', 'sparse blocks have it'),
    ('sparse/moe_layers.MoeLayer.router = @routing.ExpertsChooseMaskedRouter()', 'no counterpart'),
    ('moe_partitioning.MoePjitPartitioner.model_parallel_submesh = (2, 2, 1, 2)', 'always None'),
    ('NOBODY = 3', 'nothing reads this macro'),
    ('train/utils.DatasetConfig.pack = 1', 'always True'),
  ],
)
def test_what_has_no_place_is_listed(tmp_path, more, words):
  assert told(tmp_path, '').unplaced == []
  imports = 'from t5x.contrib.moe import models\nfrom flaxformer.components import dense\n'
  unplaced = told(tmp_path, imports + more + '\n').unplaced
  assert any(words in text for text in unplaced), unplaced


def test_a_run_that_goes_on_and_rows_that_eight_pipelines_do_not_divide(tmp_path):
  more = """utils.CheckpointConfig.restore = @utils.RestoreCheckpointConfig()
utils.RestoreCheckpointConfig:
  path = 'gs://b/checkpoint_7'
  mode = 'specific'
RANDOM_SEED = 3
BATCH_SIZE = 12
"""
  found = told(tmp_path, more)
  assert found.unplaced == []
  expected = {'INITIAL_CHECKPOINT': 'gs://b/checkpoint_7', 'SEED': 3, 'DATA_SHARDS': 4}
  assert {name: found.values[name] for name in expected} == expected


def test_an_evaluation(tmp_path, capsys):
  text = """import __main__ as eval_script
from t5x import decoding
from t5x import utils
from t5x.contrib.moe import models
CHECKPOINT_PATH = 'gs://b/checkpoint_7'
eval_script.evaluate:
  model = @models.MoeDecoderOnlyModel()
  dataset_cfg = @utils.DatasetConfig()
  restore_checkpoint_cfg = @utils.RestoreCheckpointConfig()
  output_dir = 'out'
models.MoeDecoderOnlyModel.decode_fn = @decoding.temperature_sample
models.MoeDecoderOnlyModel.predict_batch_with_aux.num_decodes = 4
decoding.temperature_sample.temperature = 0.5
decoding.temperature_sample.topk = 40
utils.DatasetConfig.mixture_or_task_name = 'trivia_qa_v010_nocontext'
utils.RestoreCheckpointConfig.path = %CHECKPOINT_PATH
"""
  path = tmp_path / 'eval.gin'
  path.write_text(text)
  assert import_gin.main([str(path)]) == 0
  out = capsys.readouterr()
  for line in (
    "CHECKPOINT = 'gs://b/checkpoint_7'",
    "OUT_DIR = 'out'",
    'SAMPLES = 4',
    "TASKS = ('triviaqa',)",
    'TEMPERATURE = 0.5',
  ):
    assert f'\n{line}\n' in out.out
  assert 'topk = 40' in out.out and '1 bindings could not be placed' in out.err


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ("include 'flaxformer/none.gin'", '--gin_search_paths'),
    ("include 'run.gin'", 'includes itself'),
    ('A = 1', 'no run'),
    ('import __main__ as t\nA = %B\nB = %A\nt.train.total_steps = %A', 'its own value'),
  ],
)
def test_files_that_are_no_run_are_usage_errors(tmp_path, monkeypatch, capsys, text, words):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'run.gin').write_text(text)
  assert import_gin.main(['run.gin']) == 64
  assert words in capsys.readouterr().err


def test_tables_do_not_contradict_each_other():
  tables = (set(places.FIXED), places.SILENT, set(places.MODEL_PLACES))
  for own in (places.TRAIN_PLACES, places.EVALUATE_PLACES):
    names = [name for table in (*tables, own) for name in table]
    assert len(names) == len(set(names))
