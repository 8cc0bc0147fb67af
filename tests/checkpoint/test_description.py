"""What a checkpoint says of itself: written, read back, and refused when it is damaged."""

import dataclasses
import json

import pytest

from openmoe.checkpoint import description as described
from openmoe.config import ConfigError, ModelConfig, MoEConfig, OptimizerConfig

MODEL = ModelConfig(
  'm', 64, 4, 32, 48, 2, 16, num_sparse_layers=2, moe=MoEConfig(4), norm_epsilon=1e-3
)
WHOLE = described.Description(
  MODEL,
  vocabulary=described.vocabulary_record('sentencepiece', '/a/spiece.model', 300, b'pieces'),
  row_length=96,
  start_id=2,
  eos_ids=(1, 5),
  chat=described.ChatRecord('folder', '{{ messages }}\n', '<s>', '</s>'),
  objective='prefix',
  tokens_seen=10**12,
  optimizer=described.optimizer_record(OptimizerConfig(clip_global_norm=1.0)),
)


def changed(**changes) -> dict:
  """WHOLE as JSON has it, with some fields replaced; `model__x` is a field of the model."""
  told = json.loads(json.dumps(WHOLE.plain()))
  for name, value in changes.items():
    *parents, last = name.split('__')
    node = told
    for parent in parents:
      node = node[parent]
    node[last] = value
  return told


def test_every_field_comes_back():
  unset = [f.name for f in dataclasses.fields(WHOLE) if getattr(WHOLE, f.name) in (None, f.default)]
  assert set(unset) <= {'version', 'pad_id'}, 'give new fields a value here'
  assert described.read_description(changed(), 'file') == WHOLE
  assert WHOLE.optimizer.place == 'opt_state/1'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'version': 2}, 'file is a description of format 2, .* reads formats up to 1; update'),
    ({'version': 0}, 'file: version=0 must be 1; take an undamaged copy'),
    ({'version': True}, 'file: version=True must be a whole number from 0 to'),
    ({'model': None}, 'file: model is None, not an object with named fields; take an undamaged'),
    ({'model': []}, r'file: model is \[\], not an object'),
    (
      {'model__name': 'a\x1b[2Jb'},
      r"file: model: name='a\\x1b\[2Jb' must be a text .* without con",
    ),
    ({'model__name': 'x' * 5000}, r'name=\'xxx.*\.\.\. must be a text of at most 1024'),
    ({'model__num_layers': None}, 'num_layers=None must be a whole number from 0 to 4096; take'),
    ({'model__num_layers': '4'}, "num_layers='4' must be a whole number"),
    ({'model__num_layers': 4.0}, 'num_layers=4.0 must be a whole number'),
    ({'model__num_layers': -4}, 'num_layers=-4 must be a whole number'),
    ({'model__num_layers': 10**9}, 'num_layers=1000000000 must be a whole number from 0 to 4096'),
    ({'model__num_heads': 0}, 'ModelConfig.num_heads=0 must be a whole number of at least 1'),
    ({'model__norm_epsilon': 'small'}, "norm_epsilon='small' must be a finite number"),
    ({'model__norm_epsilon': float('nan')}, 'norm_epsilon=nan must be a finite number'),
    ({'model__rope_theta': 10**400}, 'rope_theta=1000.* must be a finite number'),
    ({'model__remat': 'most'}, r"remat='most' must be one of \['none', 'dots', 'full'\]"),
    ({'model__float32_attention': 1}, 'float32_attention=1 must be true or false'),
    ({'model__moe': None}, 'num_sparse_layers=2 with moe=None: give both or neither; take'),
    ({'model__moe__top_k': 9}, 'file: model: moe: MoEConfig.top_k=9 is more than num_experts=4'),
    ({'model__norm_epsilom': 1}, r'norm_epsilom.*=1, which ModelConfig does not .*norm_epsilon\)'),
    ({'eos_ids': []}, r'eos_ids=\[\] must be one token or more below vocab_size=64'),
    ({'eos_ids': [1, 64]}, r'eos_ids=\[1, 64\] must be'),
    ({'eos_ids': 1}, 'eos_ids=1 must be a list of at most 1000'),
    ({'eos_ids': list(range(2000))}, 'eos_ids=.*must be a list of at most 1000'),
    ({'row_length': 0}, 'row_length=0 must be at least 1'),
    ({'vocabulary__digest': '../../etc'}, "digest='../../etc' must be 64 hexadecimal digits"),
    ({'vocabulary__kind': 'pickle'}, "kind='pickle' must be one of"),
    ({'vocabulary__path': 'a\nb'}, r"path='a\\nb' must be a text"),
    ({'vocabulary__extra_ids': 2**40}, 'extra_ids=1099511627776 must be at most'),
    ({'chat__template_text': 'x' * 2**19}, 'template_text=.* must be a text of at most 262144'),
    ({'optimizer__place': 'opt_state/../x'}, "place='opt_state/../x' must be opt_state or"),
    ({'optimizer__name': 'sgd'}, r"name='sgd' must be one of \['adafactor', 'adamw'\]"),
    ({'objective': 3}, 'objective=3 must be a text'),
    ({'auto_map': {}}, "the field 'auto_map'={}, which Description does not have"),
  ],
)
def test_what_is_damaged_is_refused_by_name(changes, message):
  with pytest.raises(ConfigError, match=message) as caught:
    described.read_description(changed(**changes), 'file')
  assert str(caught.value).startswith('file') and '\x1b' not in str(caught.value)
  assert len(str(caught.value)) < 500


def test_a_missing_field_is_named():
  told = changed()
  del told['model']['embed_dim'], told['model']['mlp_dim']
  with pytest.raises(ConfigError, match='file: model lacks embed_dim, mlp_dim, which every'):
    described.read_description(told, 'file')
  for odd in (None, [], 'text', 3):
    with pytest.raises(ConfigError, match='file is .*, not an object with named fields'):
      described.read_description(odd, 'file')


def test_checkpoints_of_before_there_were_descriptions():
  old = {
    'model': described.model_fields(MODEL),
    'task_feature_lengths': {'inputs': 8, 'targets': 9},
  }
  found = described.of_metadata({'metadata': old}, 'file')
  assert (found.model, found.row_length, found.eos_ids) == (MODEL, 17, (1,))
  tokens = {'bos_token_id': 3, 'eos_token_id': [4, 5], 'pad_token_id': None, 'auto_map': {'a': 'b'}}
  found = described.of_metadata({'metadata': old | {'hf_fields': tokens}}, 'file')
  assert (found.start_id, found.eos_ids, found.pad_id) == (3, (4, 5), 0)
  with pytest.raises(ConfigError, match="start_id='x' must be a whole number"):
    described.of_metadata({'metadata': old | {'hf_fields': {'bos_token_id': 'x'}}}, 'file')
  assert described.of_metadata({'metadata': {}}, 'file') is None
  assert 'say which it is, model=NAME' in described.undescribed('run', {'num_layers': 2})
  for odd in (None, [], {'metadata': 3}):
    with pytest.raises(ConfigError, match='file has no metadata'):
      described.of_metadata(odd, 'file')


def test_the_vocabulary_is_found_by_its_content(tmp_path):
  run, elsewhere = tmp_path / 'run', tmp_path / 'spiece.model'
  record = described.vocabulary_record('sentencepiece', str(elsewhere), 300, b'pieces')
  with pytest.raises(
    ConfigError, match='is neither at .*vocabulary_.*nor at .*test_the_vocabulary_is_found'
  ):
    described.find_vocabulary(run, record)
  elsewhere.write_bytes(b'others')
  with pytest.raises(ConfigError, match='spiece.model is not the vocabulary that the checkpoint'):
    described.find_vocabulary(run, record)
  elsewhere.write_bytes(b'pieces')
  assert described.find_vocabulary(run, record) == b'pieces'
  described.keep_vocabulary(run, record, b'pieces')
  elsewhere.unlink()
  assert described.find_vocabulary(run, record) == b'pieces'
  assert [p.name for p in run.iterdir()] == [record.file_name]
