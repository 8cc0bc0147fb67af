"""Our PyTorch model: generation, padding, loss, training, saving, and the published layout."""

# ruff: noqa: E402 (what follows needs torch, so its absence is looked into first)
import functools
import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from torch.nn import functional

from convert.core.names import name_table
from convert.core.source import find_form
from convert.torch.configuration_openmoe import OpenMoeConfig
from convert.torch.experts_openmoe import expert_capacity, router_losses
from convert.torch.modeling_openmoe import OpenMoeForCausalLM
from openmoe.config import CapacityConvention
from openmoe.layers.moe import router
from tests.convert import case
from tests.parity import torch_openmoe as parity

TINY = {
  'vocab_size': 40,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 4,
  'num_attention_heads': 3,
  'head_dim': 8,
  'num_experts': 4,
  'moe_layer_interval': 2,
  'max_position_embeddings': 64,
}


@functools.cache
def tiny(attention='sdpa', **fields):
  torch.manual_seed(0)
  config = OpenMoeConfig(**TINY, **fields)
  return OpenMoeForCausalLM._from_config(config, attn_implementation=attention).eval()


def tokens(rows, length, seed=0):
  x = torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
  x[:, 0] = 0
  return x


def left_pad(rows, length):
  """(ids, mask) of rows of different lengths; each begins with its own 0."""
  ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
  for i, row in enumerate(rows):
    ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
  return ids, mask.long()


def close(a, b, limit=2e-5):
  assert float((a - b).detach().abs().max()) <= limit


def test_parity_with_the_published_port():
  with np.load(case.GOLDEN / 'torch_openmoe_a.npz') as file:
    result = parity.compare({name: file[name] for name in file.files})
  assert all(result[name] <= limit for name, limit in parity.LIMITS.items()), result


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@torch.no_grad()
def test_cached_generation_equals_the_full_forward(attention):
  model, x = tiny(attention), tokens(3, 12)
  full = model(x, use_cache=False).logits
  cache = model(x[:, :5], use_cache=True).past_key_values
  chunk = model(x[:, 5:9], past_key_values=cache, use_cache=True)  # several tokens after a past
  close(chunk.logits, full[:, 5:9])
  for t in range(9, 12):
    close(model(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, 0], full[:, t])
  made = model.generate(
    x[:, :5], attention_mask=torch.ones(3, 5), max_new_tokens=6, eos_token_id=39
  )
  again = x[:, :5]
  for _ in range(made.shape[1] - 5):
    again = torch.cat([again, model(again).logits[:, -1:].argmax(-1)], dim=1)
  ended = (made[:, 5:] == 39).cumsum(-1) > 0
  assert bool(((made == again)[:, 5:] | ended).all())


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@torch.no_grad()
def test_left_padded_batches_equal_single_rows(attention):
  model = tiny(attention)
  rows = [tokens(1, n, seed=n)[0] for n in (4, 9, 7)]
  ids, mask = left_pad(rows, 9)
  out = model(ids, attention_mask=mask).logits
  for i, row in enumerate(rows):
    close(out[i, 9 - len(row) :], model(row[None]).logits[0])
  made = model.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=None)
  for i, row in enumerate(rows):
    single = model.generate(row[None], max_new_tokens=5, eos_token_id=None)
    assert made[i, 9:].tolist() == single[0, len(row) :].tolist()
  # Without a mask it is inferred from the padding, and must not hide the 0 that begins a text.
  assert torch.equal(model.generate(ids, max_new_tokens=5, eos_token_id=None), made)


@torch.no_grad()
def test_right_padding_changes_no_real_token():
  model, x = tiny(), tokens(2, 10)
  mask = torch.ones(2, 10).long()
  mask[0, 6:] = 0
  close(model(x, attention_mask=mask).logits[0, :6], model(x[:1, :6]).logits[0])


def test_loss_is_a_mean_over_labels_that_count():
  model, x = tiny(), tokens(2, 8)
  mask = torch.ones(2, 8).long()
  mask[1, 5:] = 0
  labels = x.clone()
  labels[0, :4] = -100
  out = model(x, attention_mask=mask, labels=labels)
  logits = out.logits[:, :-1]
  counted = [(0, t) for t in range(3, 7)] + [(1, t) for t in range(4)]
  nll = torch.stack([functional.cross_entropy(logits[i, t], x[i, t + 1]) for i, t in counted])
  z = torch.stack([logits[i, t].logsumexp(-1) ** 2 for i, t in counted])
  close(out.cross_entropy, nll.mean(), 1e-5)
  close(out.logit_z_loss, z.mean(), 1e-4)
  expected = nll.mean() + 1e-4 * z.mean()
  expected = expected + 0.01 * out.load_balance_loss + 1e-4 * out.router_z_loss
  close(out.loss, expected, 1e-5)
  halves = [
    model(x[i : i + 1], attention_mask=mask[i : i + 1], labels=labels[i : i + 1]) for i in (0, 1)
  ]
  parts = [
    model(
      x[i : i + 1],
      attention_mask=mask[i : i + 1],
      labels=labels[i : i + 1],
      num_items_in_batch=8,
    ).loss
    for i in (0, 1)
  ]
  close(sum(parts), (halves[0].loss + halves[1].loss) / 2, 1e-5)  # four labels each


def test_label_smoothing_is_close_to_the_plain_loss():
  """The port's own smoothing multiplies the loss by about the vocabulary (its bug)."""
  x = tokens(2, 8)
  plain, smoothed = tiny(), tiny(label_smoothing=0.001)
  smoothed.load_state_dict(plain.state_dict())
  a, b = plain(x, labels=x).cross_entropy, smoothed(x, labels=x).cross_entropy
  assert 0 < abs(float(a - b)) < 0.02 * float(a)


def test_router_losses_at_perfect_balance():
  logits = torch.log_softmax(
    torch.eye(4).repeat(3, 1) * 5 + torch.eye(4).roll(1, 1).repeat(3, 1), -1
  )
  balance, z = router_losses((logits, logits), None, top_k=2)
  close(balance, torch.tensor(2.0), 1e-6)
  close(z, torch.tensor(0.0), 1e-6)
  mask = torch.zeros(12, dtype=torch.bool)
  mask[:3] = True  # three of four experts first: no longer balanced
  assert float(router_losses((logits,), mask, 2)[0]) > 2.05
  total, z = router_losses((logits, 0 * logits), None, 2, 'sum')
  close(total, torch.tensor(2.0), 1e-6)  # 1 a layer, of two layers
  close(z, torch.log(torch.tensor(4.0)) ** 2, 1e-5)


def test_another_balance_loss_is_not_computed_under_this_name():
  x = tokens(1, 6)
  model = tiny(router_balance_loss='switch')
  assert model(x).loss is None
  with pytest.raises(ValueError, match="router_balance_loss='switch' is not computed here"):
    model(x, labels=x)


def test_row_0_of_the_embedding_trains():
  model = tiny()
  model.zero_grad()
  model(tokens(2, 6), labels=tokens(2, 6)).loss.backward()
  assert float(model.model.embed_tokens.weight.grad[0].abs().sum()) > 0
  model.zero_grad()


def test_gradients_survive_checkpointing():
  x = tokens(2, 8)
  plain, saved = tiny(), tiny(use_cache=False)
  saved.load_state_dict(plain.state_dict())
  saved.activation_checkpointing_enable()
  for model in (plain, saved):
    model.train()
    model(x, labels=x).loss.backward()
    model.eval()
  for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
    assert torch.allclose(a.grad, b.grad, atol=1e-6), name
  plain.zero_grad()


@pytest.mark.parametrize(
  ('name', 'convention'),
  [(convention.value, convention) for convention in CapacityConvention],
)
def test_capacity_is_that_of_the_jax_model(name, convention):
  for n in (16, 60, 100, 250, 4096):
    for e, train in ((4, True), (16, False), (32, True)):
      config = OpenMoeConfig(num_experts=e, router_capacity=name)
      factor = 1.25 if train else 2.0
      mine = expert_capacity(config, n, train)
      assert mine == router.expert_capacity(n, e, factor, convention=convention)


@torch.no_grad()
@pytest.mark.parametrize('capacity', ['released', 'with_top_k'])
def test_capacity_drops_by_group(capacity):
  fields = {'router_group_size': 16, 'router_min_capacity': 1, 'router_capacity_factor_eval': 0.5}
  model = tiny(router_capacity=capacity, **fields)
  x = tokens(4, 8)
  alone = torch.cat([model(x[:2]).logits, model(x[2:]).logits])
  close(model(x).logits, alone)
  assert float((alone - tiny()(x).logits).abs().max()) > 1e-3, 'nothing was dropped'
  with pytest.raises(ValueError, match='24 tokens do not divide into groups'):
    model(tokens(3, 8))


def test_outputs_that_are_asked_for():
  model, x = tiny('eager'), tokens(2, 6)
  out = model(x, output_hidden_states=True, output_attentions=True, output_router_logits=True)
  assert len(out.hidden_states) == 5
  assert [tuple(a.shape) for a in out.attentions] == [(2, 3, 6, 6)] * 4
  assert [tuple(r.shape) for r in out.router_logits] == [(12, 4)] * 2
  assert model(x).router_logits is None
  close(model(x, logits_to_keep=1).logits[:, 0], out.logits[:, -1])


def test_save_and_load_round_trip(tmp_path):
  model = tiny()
  model.save_pretrained(tmp_path)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  assert type(again) is OpenMoeForCausalLM
  for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
    assert torch.equal(a, b), name
  assert again.config.to_dict()['moe_layer_interval'] == 2


def test_an_export_loads_by_itself_in_a_process_without_this_repository(hf, ours, tmp_path):
  x = tokens(2, 7) % 32
  np.save(tmp_path / 'x.npy', x.numpy())
  code = (
    'import sys, numpy, torch, transformers\n'
    f'f = {str(hf)!r}\n'
    'm = transformers.AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True)\n'
    f'x = torch.from_numpy(numpy.load({str(tmp_path / "x.npy")!r}))\n'
    f'numpy.save({str(tmp_path / "y.npy")!r}, m(x).logits.detach().numpy())\n'
    'assert not {"jax", "convert", "openmoe"} & set(sys.modules)\n'
    'assert m.config.model_type == "openmoe", m.config.model_type\n'
  )
  environment = {'HF_HOME': str(tmp_path), 'PATH': '/usr/bin:/bin', 'OMP_NUM_THREADS': '1'}
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  from convert.logits import forward

  expected = forward(find_form(ours), case.CONFIG, x.numpy()).logits
  np.testing.assert_allclose(np.load(tmp_path / 'y.npy'), expected, atol=2e-5)


def test_a_bin_that_torch_wrote_is_imported(hf, tmp_path):
  """The form of the published weights: .bin shards, model_type llama, transposed views kept."""
  folder = case.copy(hf, tmp_path / 'hf')
  (folder / 'model.safetensors').unlink()
  config = json.loads((folder / 'config.json').read_text())
  config |= {'model_type': 'llama', 'architectures': ['OpenMoeForCausalLM']}
  (folder / 'config.json').write_text(json.dumps(config))
  state, weights = {}, case.weights()
  for row in name_table(case.CONFIG):
    x = torch.from_numpy(weights[row.hf])
    state[row.hf] = x.T if row.transposed else x
  names, where = list(state), {}
  for i, part in enumerate((names[:20], names[20:])):
    file = f'pytorch_model-{i}.bin'
    torch.save({n: state[n] for n in part}, folder / file)
    where |= dict.fromkeys(part, file)
  (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': where}))
  loaded = case.loaded(case.run_convert(folder, 'ours', tmp_path / 'run'))
  for name, x in weights.items():
    np.testing.assert_array_equal(loaded[name], x)


def test_it_learns_through_the_trainer(tmp_path):
  text = tokens(8, 16, seed=3)
  data = [
    {'input_ids': row, 'attention_mask': torch.ones(16).long(), 'labels': row} for row in text
  ]
  torch.manual_seed(0)
  model = OpenMoeForCausalLM(OpenMoeConfig(**TINY))
  arguments = transformers.TrainingArguments(
    output_dir=str(tmp_path),
    max_steps=30,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy='no',
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
  )
  trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
  trainer.train()
  losses = [line['loss'] for line in trainer.state.log_history if 'loss' in line]
  assert losses[0] == pytest.approx(np.log(40), rel=0.25)
  assert np.mean(losses[-3:]) < 0.5 * losses[0]
