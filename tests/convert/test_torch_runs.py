"""Ways to run our PyTorch model: a static cache, torch.compile, weights on disk (extra torch)."""

# ruff: noqa: E402 (what follows needs torch, so its absence is looked into first)
import json

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytest.importorskip('accelerate')

from transformers.cache_utils import StaticCache

from convert.torch.modeling_openmoe import OpenMoeForCausalLM
from tests.convert.test_torch_model import TINY, tiny, tokens


def greedy(model, ids, **options):
  return model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)


def test_a_static_cache_gives_the_tokens_of_a_growing_one():
  model, ids = tiny(), tokens(2, 7)
  assert torch.equal(
    greedy(model, ids, cache_implementation='static', disable_compile=True), greedy(model, ids)
  )


def test_the_compiled_model_computes_what_the_plain_one_does():
  """Traced and run as written; making machine code of it is torch's affair."""
  model, ids = tiny(), tokens(2, 7)
  compiled = torch.compile(model, backend='eager', dynamic=False)
  cache = lambda: StaticCache(config=model.config, max_cache_len=16)
  with torch.no_grad():
    expected = model(ids, past_key_values=cache()).logits
    found = compiled(ids, past_key_values=cache()).logits
  torch.testing.assert_close(found, expected)


def test_weights_on_disk_give_the_tokens_of_weights_in_memory(tmp_path):
  """As `device_map='auto'` does where a model is larger than its devices."""
  model, ids = tiny(), tokens(2, 7)
  model.save_pretrained(tmp_path / 'model')
  names = ['model.embed_tokens', 'model.norm', 'lm_head']
  layers = [f'model.layers.{i}' for i in range(TINY['num_hidden_layers'])]
  places = dict.fromkeys(names, 'cpu') | {
    name: 'disk' if i % 2 else 'cpu' for i, name in enumerate(layers)
  }
  offloaded = OpenMoeForCausalLM.from_pretrained(
    tmp_path / 'model', device_map=places, offload_folder=tmp_path / 'offload'
  )
  assert {p.device.type for p in offloaded.parameters()} == {'cpu', 'meta'}
  assert torch.equal(greedy(offloaded.eval(), ids), greedy(model, ids))
  auto = OpenMoeForCausalLM.from_pretrained(tmp_path / 'model', device_map='auto').eval()
  assert torch.equal(greedy(auto, ids), greedy(model, ids))
  assert json.loads((tmp_path / 'model' / 'config.json').read_text())['model_type'] == 'openmoe'
