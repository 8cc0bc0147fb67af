"""JetMoE's names: round trips on arrays, and the transformers classes where they are installed."""

import dataclasses
import importlib.util

import flax.traverse_util
import numpy as np
import pytest

from convert import jetmoe_names
from openmoe.config import ConfigError
from openmoe.train_state import abstract_params
from tests.parity import jetmoe as parity

SIZES = dict(zip(
  ('layers', 'embed', 'heads', 'head_dim', 'experts', 'top_k', 'mlp', 'vocab'),
  (2, 16, 2, 8, 4, 2, 24, 40), strict=True,
))  # fmt: skip
needs_torch = pytest.mark.skipif(
  importlib.util.find_spec('transformers') is None or importlib.util.find_spec('torch') is None,
  reason="needs the 'torch' extra",
)
CONFIG = jetmoe_names.model_config(
  'names',
  {'model_type': 'jetmoe', 'num_hidden_layers': 3, 'hidden_size': 16, 'num_key_value_heads': 2,
   'kv_channels': 8, 'ffn_hidden_size': 24, 'vocab_size': 40, 'moe_num_experts': 4,
   'rms_norm_eps': 1e-5},
)  # fmt: skip


def shapes_of(config) -> dict[str, tuple[int, ...]]:
  flat = flax.traverse_util.flatten_dict(abstract_params(config)[0], sep='/')
  return {path: leaf.shape for path, leaf in flat.items()}


def test_round_trip_is_bit_exact():
  rng, shapes = np.random.default_rng(0), shapes_of(CONFIG)
  params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
  tensors = jetmoe_names.to_hf(params, jetmoe_names.rows(CONFIG))
  assert len(tensors) == 2 + 11 * 3
  back = jetmoe_names.from_hf(tensors.__getitem__, shapes, jetmoe_names.rows(CONFIG))
  assert back.keys() == params.keys()
  for path, value in params.items():
    assert back[path].tobytes() == value.tobytes(), path
  kv = tensors['model.layers.1.self_attention.kv_proj.weight']
  np.testing.assert_array_equal(kv[:16].T, params['decoder/attention/key/kernel'][1])
  np.testing.assert_array_equal(kv[16:].T, params['decoder/attention/value/kernel'][1])
  wi = tensors['model.layers.2.mlp.input_linear.weight']
  gate = params['decoder/moe/experts/wi_0/kernel'][2, 3, :, 0]
  np.testing.assert_array_equal(wi[3, :24].T, gate)


def test_the_8b_has_266_tensors():
  config = dataclasses.replace(CONFIG, num_layers=24, num_sparse_layers=24)
  assert len({row.hf for row in jetmoe_names.rows(config)}) == 266


def test_configurations_go_there_and_back():
  again = jetmoe_names.model_config('names', jetmoe_names.hf_config(CONFIG))
  assert again == CONFIG
  with pytest.raises(ConfigError, match="must be 'jetmoe'"):
    jetmoe_names.model_config('x', {'model_type': 'llama'})
  with pytest.raises(ConfigError, match='silu'):
    jetmoe_names.model_config('x', {'model_type': 'jetmoe', 'activation_function': 'gelu'})


def test_another_size_is_refused():
  shapes = shapes_of(CONFIG)
  wrong = lambda name: np.zeros((7, 7), np.float32)
  with pytest.raises(ConfigError, match='another size of JetMoE'):
    jetmoe_names.from_hf(wrong, shapes, jetmoe_names.rows(CONFIG))
  fill = lambda name: np.zeros(shapes['token_embedder/embedding'], np.float32)
  with pytest.raises(ConfigError, match='no row for'):
    jetmoe_names.from_hf(fill, shapes, [next(jetmoe_names.rows(CONFIG))])


@needs_torch
def test_parity_with_transformers():
  result = parity.compare(SIZES, seed=0)
  assert {name: result[name] <= limit for name, limit in parity.LIMITS.items()} == dict.fromkeys(
    parity.LIMITS, True
  ), result
  assert result['logit_scale'] > 0.1


@needs_torch
def test_classifier_against_transformers():
  import jax
  import torch

  from openmoe.models.classifier import SequenceClassifier

  hf = parity.random_hf_model(SIZES, seed=1, num_labels=3)
  config, tensors = parity.our_config(hf), parity.hf_tensors(hf)
  model = SequenceClassifier(config, 3)
  tokens = np.random.default_rng(0).integers(1, 40, (3, 12))
  lengths = np.array([12, 5, 9])
  tokens[np.arange(12) >= lengths[:, None]] = 0
  batch = parity.full_batch(tokens)
  batch = batch.replace(segment_ids=(np.arange(12) < lengths[:, None]).astype(np.int32))
  flat = flax.traverse_util.flatten_dict(
    jax.eval_shape(lambda: model.init(jax.random.key(0), batch, False))['params'], sep='/'
  )
  shapes = {path: leaf.value.shape for path, leaf in flat.items()}
  params = jetmoe_names.from_hf(tensors.__getitem__, shapes, jetmoe_names.classifier_rows(config))
  with torch.no_grad():
    theirs = hf(torch.from_numpy(tokens)).logits.numpy()
  nested = flax.traverse_util.unflatten_dict(params, sep='/')
  ours = model.apply({'params': nested}, batch, False).logits_bc
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  back = jetmoe_names.to_hf(params, jetmoe_names.classifier_rows(config))
  assert parity.mismatches(tensors, back) == 0
