"""Models of transformers with random weights, recorded and analysed by the same commands."""

# ruff: noqa: E402 (what follows needs torch, so its absence is looked into first)
import json

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import jax.numpy as jnp

from openmoe.atlas.counts import Study
from openmoe.atlas.identities import identities
from openmoe.atlas.record import Record
from openmoe.config import MoEConfig
from openmoe.layers.moe.router import route
from openmoe.losses import router_losses
from scripts import atlas as door

SIZES = {'vocab_size': 64, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2,
         'num_attention_heads': 2, 'num_key_value_heads': 2, 'max_position_embeddings': 64,
         'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}  # fmt: skip
CONFIGS = {
  'mixtral': lambda: transformers.MixtralConfig(
    **SIZES, num_local_experts=4, num_experts_per_tok=2
  ),
  'olmoe': lambda: transformers.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3),
  'qwen3_moe': lambda: transformers.Qwen3MoeConfig(
    **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
    norm_topk_prob=True,
  ),
  'jetmoe': lambda: transformers.JetMoeConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, kv_channels=8,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
  ),
}  # fmt: skip


def write_tokenizer(folder) -> None:
  """Words w0 to w63, in the form that a folder of transformers has."""
  words = {'<pad>': 0, '<s>': 1, '</s>': 2} | {f'w{i}': i for i in range(3, 64)}
  told = {
    'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None,
    'pre_tokenizer': {'type': 'WhitespaceSplit'}, 'post_processor': None, 'decoder': None,
    'model': {'type': 'WordLevel', 'vocab': words, 'unk_token': '<pad>'},
  }  # fmt: skip
  (folder / 'tokenizer.json').write_text(json.dumps(told))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': '</s>', 'bos_token': '<s>'})
  )


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  generator = np.random.default_rng(0)
  path = tmp_path_factory.mktemp('texts') / 'texts.jsonl'
  lines = [
    {'text': ' '.join(f'w{i}' for i in generator.integers(3, 64, 30)), 'domain': 'ab'[n % 2]}
    for n in range(6)
  ]
  path.write_text('\n'.join(map(json.dumps, lines)))
  return path


@pytest.mark.parametrize('name', list(CONFIGS))
def test_a_model_of_transformers_is_recorded_and_analysed(name, texts, tmp_path):
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
  folder = tmp_path / name
  model.save_pretrained(folder)
  write_tokenizer(folder)
  record = tmp_path / 'record'
  command = ['record', '--transformers', '--checkpoint', str(folder), '--data', str(texts)]
  assert door.main([*command, '--length', '16', '--out', str(record)]) == 0
  assert door.main(['check', str(record)]) == 0
  found = Record(record)
  header = found.header
  kinds = [str(router) for router in header.routers]
  both = ['attention.0', 'mlp.0', 'attention.1', 'mlp.1']
  assert kinds == (both if name == 'jetmoe' else ['mlp.0', 'mlp.1'])
  assert all(one.holds for one in identities(Study(found)))
  (part,) = found.parts()
  first = np.asarray(part['piece'] == 0) & np.asarray(part['document'] == 0)
  tokens = torch.tensor(np.asarray(part['token_id'])[first][None].astype(np.int64))
  with torch.no_grad():
    out = model(input_ids=tokens, output_router_logits=True)
  logs = torch.log_softmax(out.logits[0, :-1], -1).gather(1, tokens[0, 1:, None])[:, 0]
  np.testing.assert_allclose(np.asarray(part['next_log_prob'])[first][:-1], logs, atol=1e-5)
  if name != 'jetmoe':  # there transformers names the routers of attention twice
    for router, logits in enumerate(out.router_logits):
      chosen = logits.topk(header.top_k, dim=-1).indices
      np.testing.assert_array_equal(np.asarray(part['expert'])[first, router], chosen)
  pages = tmp_path / 'pages'
  arguments = ['analyse', str(record), '--out', str(pages), '--only', 'load,coactivation,profile']
  assert door.main(arguments) == 0
  assert 'All identities hold' in (pages / 'index.html').read_text()


def test_transformers_agrees_about_its_balance_loss():
  modeling = transformers.models.mixtral.modeling_mixtral
  x = np.random.default_rng(0).normal(size=(2, 3, 8, 4)).astype(np.float32)
  gates = tuple(torch.tensor(layer.reshape(-1, 4)) for layer in x)
  expected = float(modeling.load_balancing_loss_func(gates, 4, 2))
  moe = MoEConfig(4, balance_loss='mixtral', load_balance_weight=1.0)
  stats = [route(jnp.asarray(layer), None, moe, None).stats for layer in x]
  stacked = stats[0].replace(
    load_balance_loss=jnp.stack([s.load_balance_loss for s in stats]),
    router_z_loss=jnp.stack([s.router_z_loss for s in stats]),
  )
  found = float(router_losses(stacked, moe)['load_balance_loss'])
  assert found == pytest.approx(expected, rel=1e-5)
