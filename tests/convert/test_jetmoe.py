"""JetMoE through every conversion, and beside transformers' own classes where installed."""

import dataclasses
import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert import sizes
from convert.core.names import NamesError, classifier_table, hf_names, name_table, to_hf
from convert.core.source import model_shapes
from convert.core.tensors import ConvertError
from convert.formats import hf_config
from convert.load import load_classifier, load_params
from convert.logits import forward
from convert.run import Options, convert, find_form
from openmoe.checkpoint.description import Description
from openmoe.models import abstract_params, build_model
from tests.convert import case
from tests.parity import jetmoe as parity

needs_torch = pytest.mark.skipif(
  importlib.util.find_spec('transformers') is None or importlib.util.find_spec('torch') is None,
  reason="needs the 'torch' extra",
)
SIZES = {
  'layers': 2,
  'embed': 16,
  'heads': 2,
  'head_dim': 8,
  'experts': 4,
  'top_k': 2,
  'mlp': 24,
  'vocab': 40,
}
KV = 'model.layers.1.self_attention.kv_proj.weight'
# As the first release wrote it.
FIRST = {
  'architectures': ['JetMoEForCausalLM'],
  'model_type': 'jetmoe',
  'activation_function': 'silu',
  'bias': True,
  'glu': True,
  'rotary_percent': 1.0,
  'vocab_size': 64,
  'num_hidden_layers': 3,
  'hidden_size': 32,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'kv_channels': 16,
  'ffn_hidden_size': 24,
  'moe_num_experts': 4,
  'moe_top_k': 2,
  'n_positions': 4096,
  'layer_norm_epsilon': 1e-05,
  'rope_theta': 10000.0,
  'bos_token_id': 1,
  'eos_token_id': 2,
}


def same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype, name
    assert found[name].tobytes() == x.tobytes(), name


def test_the_8b_has_its_published_tensors_and_parameters():
  config = sizes.named('jetmoe_8b')
  rows, shapes = list(name_table(config)), model_shapes(config)
  assert len(hf_names(rows)) == 266
  assert len({row.name for row in rows}) == len(rows) == 290  # keys and values are two of ours
  assert sum(int(np.prod(shape)) for shape in shapes.values()) == 8_522_237_952
  assert shapes[f'{KV}[0 of 2]'] == (2048, 2048)
  assert shapes['model.layers.5.mlp.input_linear.weight'] == (8, 2048, 11264)


def test_the_layout_is_that_of_transformers(jetmoe_hf):
  tensors = safetensors.numpy.load_file(jetmoe_hf / 'model.safetensors')
  assert len(tensors) == 2 + 11 * 3
  params = load_params(find_form(jetmoe_hf), case.JETMOE)
  attention, moe = params['decoder']['attention'], params['decoder']['moe']
  np.testing.assert_array_equal(tensors[KV][:32].T, attention['key']['kernel'][1])
  np.testing.assert_array_equal(tensors[KV][32:].T, attention['value']['kernel'][1])
  wi = tensors['model.layers.2.mlp.input_linear.weight']
  assert wi.shape == (4, 48, 32)
  np.testing.assert_array_equal(wi[3, :24].T, moe['experts']['wi_0']['kernel'][2, 3, :, 0])
  np.testing.assert_array_equal(wi[3, 24:].T, moe['experts']['wi_0']['kernel'][2, 3, :, 1])
  router = tensors['model.layers.0.self_attention.experts.router.layer.weight']
  np.testing.assert_array_equal(router.T, attention['router']['kernel'][0])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trips_are_bit_exact(dtype, tmp_path):
  kind = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}[dtype]
  weights = {n: x.astype(kind) for n, x in case.weights(case.JETMOE).items()}
  run = case.write_ours(tmp_path / 'run', weights, config=case.JETMOE)
  hf = case.run_convert(run, 'hf', tmp_path / 'hf', max_shard=20_000)
  assert len(list(hf.glob('model-*.safetensors'))) > 3
  back = case.run_convert(hf, 'ours', tmp_path / 'back')
  for path in (hf, back):
    same(case.loaded(path, case.JETMOE), weights)
  assert 'agree in every tensor' in case.cli('verify', run, hf)
  for path in (hf, back):
    assert 'is sound' in case.cli('fsck', path)
  assert not list(hf.glob('*.py')), 'transformers has the model'


def test_the_receipt_has_both_parts_of_a_joined_tensor(jetmoe, jetmoe_hf):
  receipt = json.loads((jetmoe_hf / 'conversion_receipt.json').read_text())
  lines = {line['target']: line for line in receipt['tensors']}
  assert lines.keys() == case.weights(case.JETMOE).keys()
  assert lines[f'{KV}[1 of 2]']['source'] == 'decoder/attention/value/kernel[1]'
  form, source = find_form(jetmoe_hf), find_form(jetmoe)
  for row in name_table(case.JETMOE):
    line = lines[row.name]
    assert line['operation'] == ('transpose' if row.transposed else 'copy')
    assert line['sha256_before'] == source.parameter(row).sha256()
    assert line['sha256_after'] == form.parameter(row).sha256()
  assert receipt['logits']['max_logit_difference'] < 1e-5


def test_inspect_and_diff(jetmoe, jetmoe_hf, tmp_path):
  assert json.loads(case.cli('inspect', jetmoe_hf, '--json'))['sizes']['num_experts'] == 4
  changed = {n: x.copy() for n, x in case.weights(case.JETMOE).items()}
  changed['model.layers.1.mlp.output_linear.weight'][2] *= 1.5
  changed['model.layers.2.self_attention.experts.router.layer.weight'] *= 1.1
  other = case.write_ours(tmp_path / 'run', changed, config=case.JETMOE)
  found = json.loads(case.cli('diff', jetmoe, other, '--json'))
  assert {n for n, change in found['modules'].items() if change} == {'experts', 'router'}
  assert found['router_drift']['2'] == found['router_drift']['1 attention'] == 0
  np.testing.assert_allclose(found['router_drift']['2 attention'], 0.1, rtol=1e-5)
  assert np.flatnonzero(found['experts']['1']).tolist() == [2]
  assert not np.any(found['experts']['1 attention'])
  assert 'layer 2 attention: router drift 1.0' in case.cli('diff', jetmoe, other)


def test_t5x_is_refused_both_ways(jetmoe, t5x, tmp_path):
  text = case.cli('export', '--to', 't5x', jetmoe, tmp_path / 'x', expect=64)
  assert 'is a jetmoe, for which t5x has no model' in text
  arguments = ('import', '--from', 't5x', '--model', 'jetmoe_tiny', t5x, tmp_path / 'x')
  assert 'architecture is openmoe there and jetmoe in' in case.cli(*arguments, expect=64)
  assert not list(tmp_path.iterdir())


# --- config.json


def test_configurations_go_there_and_back():
  config = sizes.named('jetmoe_8b')
  fields = hf_config.to_hf(Description(config), 'bfloat16', None)
  again = sizes.of_told(hf_config.sizes(fields), 'config.json')
  # How activations are recomputed and tokens are grouped is of a run, not of the weights.
  assert dataclasses.replace(again, remat=config.remat) == config
  first = sizes.of_told(hf_config.sizes(FIRST), 'config.json')
  assert dataclasses.replace(first, name='tiny_jetmoe', dtype='float32') == case.JETMOE


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'activation_function': 'gelu'}, "activation_function='gelu'; only 'silu'"),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings=False; only True'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "scales rotary positions \\('yarn'\\)"),
    ({'model_type': 'llama'}, "model_type='llama' .*give a folder of OpenMoE or JetMoE"),
  ],
)
def test_what_would_compute_something_else_is_refused(changed, message):
  with pytest.raises(ConvertError, match=message):
    hf_config.sizes(FIRST | changed)


def test_sizes_alone_do_not_make_the_same_model(jetmoe_hf, tmp_path):
  """A folder that computes otherwise than --model, or than the size it resembles, says so."""
  folder = case.copy(jetmoe_hf, tmp_path / 'hf')
  path = folder / 'config.json'
  fields = json.loads(path.read_text())
  path.write_text(json.dumps(fields | {'rms_norm_eps': 1e-3, 'num_experts_per_tok': 1}))
  config = sizes.of_form(find_form(folder), None)
  assert (config.final_norm_epsilon, config.moe.top_k) == (1e-3, 1)
  model = case.model_file(tmp_path / 'model.json', case.JETMOE)
  with pytest.raises(ConvertError, match=r'top_k is 1 there and 2 .*final_norm_epsilon is 0.001'):
    sizes.of_form(find_form(folder), model)
  # An import remembers it, and what else the folder told.
  path.write_text(json.dumps(fields | {'rms_norm_eps': 1e-3, 'eos_token_id': 5, 'pad_token_id': 5}))
  run = case.run_convert(folder, 'ours', tmp_path / 'run')
  back = case.run_convert(run, 'hf', tmp_path / 'back')
  again = json.loads((back / 'config.json').read_text())
  # The folder's generation_config.json names another end; both are ends.
  assert (again['rms_norm_eps'], again['eos_token_id']) == (1e-3, [5, 1])
  assert json.loads((back / 'generation_config.json').read_text())['pad_token_id'] == 5


# --- in memory


@pytest.mark.parametrize('kind', ['ours', 'hf', 't5x', 'jetmoe', 'jetmoe_hf'])
def test_every_form_loads_into_memory(kind, request):
  config = case.JETMOE if 'jetmoe' in kind else case.CONFIG
  params = load_params(find_form(request.getfixturevalue(kind)), config)
  flat = {'/'.join(k.key for k in path): x for path, x in _leaves(params)}
  shapes = {'/'.join(k.key for k in p): x.shape for p, x in _leaves(abstract_params(config)[0])}
  assert {path: x.shape for path, x in flat.items()} == shapes
  for row in name_table(config):
    np.testing.assert_array_equal(row.to_t5x(flat[row.ours]), case.weights(config)[row.name])
  rounded = load_params(find_form(request.getfixturevalue(kind)), config, ml_dtypes.bfloat16)
  assert {x.dtype for _, x in _leaves(rounded)} == {np.dtype(ml_dtypes.bfloat16)}


def _leaves(tree):
  import jax

  return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_loading_refuses_another_model(jetmoe_hf, hf):
  narrow = dataclasses.replace(case.JETMOE, mlp_dim=16)
  with pytest.raises(ConvertError, match='mlp.input_linear.weight has shape'):
    load_params(find_form(jetmoe_hf), narrow)
  odd = dataclasses.replace(case.JETMOE, num_heads=3)
  with pytest.raises(ConvertError, match=r'kv_proj.weight\[0 of 2\] has shape \[32, 32\], not'):
    load_params(find_form(jetmoe_hf), odd)
  with pytest.raises(NamesError, match='does not belong'):
    load_params(find_form(hf), case.JETMOE)
  with pytest.raises(NamesError, match='no published sequence classifier'):
    load_classifier(find_form(hf), case.CONFIG, 3)


# --- transformers


@needs_torch
def test_parity_with_transformers():
  result = parity.compare(SIZES, seed=0)
  within = {name: result[name] <= limit for name, limit in parity.LIMITS.items()}
  assert within == dict.fromkeys(parity.LIMITS, True), result
  assert result['logit_scale'] > 0.1
  assert result['tensors'] == 2 + 11 * SIZES['layers']


@needs_torch
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_export_loads_with_transformers_and_computes_the_same(dtype, jetmoe, tmp_path):
  import torch
  from transformers import AutoModelForCausalLM

  hf = case.run_convert(jetmoe, 'hf', tmp_path / 'hf', dtype=dtype)
  model = AutoModelForCausalLM.from_pretrained(hf, attn_implementation='eager')
  assert str(model.dtype) == f'torch.{dtype}'
  assert model.lm_head.weight is model.model.embed_tokens.weight
  tokens = np.random.default_rng(0).integers(0, 64, (2, 11))
  with torch.no_grad():
    theirs = model.float()(torch.from_numpy(tokens)).logits.numpy()
  params = load_params(find_form(hf), case.JETMOE, np.float32)
  run = build_model(case.JETMOE).apply({'params': params}, parity.full_batch(tokens), train=False)
  np.testing.assert_allclose(run.logits(), theirs, atol=1e-5)
  np.testing.assert_allclose(forward(find_form(hf), case.JETMOE, tokens).logits, theirs, atol=1e-5)


@needs_torch
def test_a_bin_that_repeats_the_tied_tensor_is_imported(jetmoe_hf, tmp_path):
  import torch

  folder = case.copy(jetmoe_hf, tmp_path / 'hf')
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  (folder / 'config.json').write_text(json.dumps(FIRST))
  state = {name: torch.from_numpy(x) for name, x in tensors.items()}
  state['lm_head.weight'] = state['model.embed_tokens.weight']
  torch.save(state, folder / 'pytorch_model.bin')
  run = case.run_convert(folder, 'ours', tmp_path / 'run')
  same(case.loaded(run, case.JETMOE), case.weights(case.JETMOE))
  state['lm_head.weight'] = state['lm_head.weight'].clone()
  state['lm_head.weight'][3, 4] += 1
  torch.save(state, folder / 'pytorch_model.bin')
  expected = 'lm_head.weight differs from model.embed_tokens.weight, to which it is tied'
  with pytest.raises(ConvertError, match=expected):
    convert(find_form(folder), 'ours', tmp_path / 'other', None, Options())
  assert expected in case.cli('fsck', folder, expect=1)


@needs_torch
def test_classifier_against_transformers(tmp_path):
  import flax.traverse_util
  import torch

  from openmoe.models.classifier import SequenceClassifier

  hf = parity.random_hf_model(SIZES, seed=1, num_labels=3)
  hf.save_pretrained(tmp_path)
  form = find_form(tmp_path)
  config = dataclasses.replace(sizes.of_form(form, None), dtype='float32')
  params = load_classifier(form, config, 3)
  tokens = np.random.default_rng(0).integers(1, 40, (3, 12))
  lengths = np.array([12, 5, 9])
  tokens[np.arange(12) >= lengths[:, None]] = 0
  batch = parity.full_batch(tokens)
  batch = batch.replace(segment_ids=(np.arange(12) < lengths[:, None]).astype(np.int32))
  with torch.no_grad():
    theirs = hf(torch.from_numpy(tokens)).logits.numpy()
  ours = SequenceClassifier(config, 3).apply({'params': params}, batch, False).logits_bY
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  back = to_hf(classifier_table(config), flax.traverse_util.flatten_dict(params, sep='/'))
  assert parity.mismatches(parity.hf_tensors(hf), back) == 0
