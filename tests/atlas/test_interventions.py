"""What is done to decisions: bans, forced experts, permutations, sweeps, replays; and its words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.atlas import interventions, recording
from openmoe.atlas.counts import Study
from openmoe.atlas.forward import Calls, Forward
from openmoe.atlas.record import Document, Record
from openmoe.config import ConfigError
from openmoe.inference.model import LanguageModel
from openmoe.inference.routing import parse, routed
from openmoe.models.decoding import unstack
from tests.atlas.test_record import ABOUT, CAPACITY, texts
from tests.inference import case

CALLS = Calls(length=16)
ROW = [[0, 5, 9, 33, 7, 2, 41, 8]]


def seen(model, rows=ROW, **options):
  return Forward(model, CALLS)(rows, **options)


def real(x_RNk, row=ROW[0]):
  return x_RNk[:, : len(row)]


@pytest.mark.parametrize('name', ['openmoe', pytest.param('jetmoe', marks=pytest.mark.slow)])
def test_banned_experts_are_never_chosen_and_others_share_their_probability(name):
  model = case.model(name)
  before, after = seen(model), seen(routed(model, 'ban=mlp:1'))
  router = -1
  assert (real(before.expert_RNk)[router] == 1).any()
  assert not (real(after.expert_RNk)[router] == 1).any()
  free = ~(real(before.expert_RNk)[router] == 1).any(axis=-1)
  logits_kept = np.log(np.delete(seen_probs(model)[router], 1, axis=-1))
  probs = np.exp(logits_kept) / np.exp(logits_kept).sum(-1, keepdims=True)
  if name == 'openmoe':  # raw probabilities: of the three that are left
    np.testing.assert_allclose(
      real(after.weight_RNk)[router][:, 0], probs.max(-1), rtol=2e-3
    )  # half precision
  np.testing.assert_array_equal(
    real(before.expert_RNk)[router][free], real(after.expert_RNk)[router][free]
  )
  assert not np.array_equal(before.next_log_prob_bt, after.next_log_prob_bt)


def seen_probs(model):
  found = Forward(model, CALLS, with_probs=True)(ROW).probs_RNe
  return real(found).astype(float)


def test_forced_experts_come_first_with_their_own_probability():
  model = case.model('openmoe')
  after = seen(routed(model, 'force=all:2'))
  assert (real(after.expert_RNk)[0, :, 0] == 2).all()
  np.testing.assert_allclose(real(after.weight_RNk)[0, :, 0], seen_probs(model)[0, :, 2], rtol=2e-3)


def test_a_permutation_of_experts_and_of_their_weights_is_the_same_model():
  """Expert e's work sent to p(e), whose weights are those of e: the same logits."""
  model, order = case.model('openmoe'), np.array([2, 0, 3, 1])
  parameters = jax.tree.map(jnp.asarray, case.parameters('openmoe'))
  experts = parameters['decoder']['sparse']['moe']['experts']
  inverse = np.argsort(order)
  moved = jax.tree.map(lambda x: x[:, inverse], experts)
  sparse = parameters['decoder']['sparse']
  other = parameters | {'decoder': parameters['decoder'] | {
    'sparse': sparse | {'moe': sparse['moe'] | {'experts': moved}}}}  # fmt: skip
  permuted = LanguageModel(case.CONFIGS['openmoe'], other, case.Numbers(), max_length=64)
  words = 'permute=all:' + ','.join(map(str, order))
  a, b = seen(model), seen(routed(permuted, words))
  np.testing.assert_allclose(a.next_log_prob_bt, b.next_log_prob_bt, atol=1e-5)
  np.testing.assert_array_equal(order[real(a.expert_RNk)], real(b.expert_RNk))
  assert not np.allclose(a.next_log_prob_bt, seen(permuted).next_log_prob_bt, atol=1e-3)


def test_fewer_choices_are_the_first_ones():
  model = case.model('openmoe')
  one = seen(routed(model, 'top_k=1'))
  assert one.expert_RNk.shape[-1] == 1
  first = lambda found: real(found.expert_RNk)[0, :, 0]
  np.testing.assert_array_equal(first(one), first(seen(model)))


def test_generation_and_scoring_go_by_the_same_override():
  model = case.model('openmoe')
  banned = routed(model, 'ban=mlp:1')
  request = ((5, 9), (33, 7))
  logs = seen(banned, [[0, 5, 9, 33, 7]]).next_log_prob_bt[0, 2:4]
  (score,) = banned.score([request])
  np.testing.assert_allclose(score.token_log_probs, logs, atol=1e-5)
  (plain,) = model.score([request])
  assert abs(plain.log_prob - score.log_prob) > 1e-4
  nothing = routed(model, 'permute=all:0,1,2,3')
  assert nothing.generate([[5, 9]], 6)[0][0].tokens == model.generate([[5, 9]], 6)[0][0].tokens
  probability = lambda m: m.generate([[5, 9]], 6)[0][0].log_probs
  np.testing.assert_allclose(probability(nothing), probability(model), atol=1e-6)
  assert not np.allclose(probability(banned)[0], probability(model)[0], atol=1e-5)
  assert banned.fingerprint != model.fingerprint


@pytest.mark.parametrize('name', ['openmoe', 'jetmoe', 'capacity'])
def test_a_replayed_record_gives_equal_logits_bit_for_bit(name, tmp_path):
  capacity = name == 'capacity'
  model = case.model('openmoe' if capacity else name, capacity=capacity)
  calls = CAPACITY if capacity else CALLS
  recording.record(model, texts(), tmp_path / 'r', calls, about=ABOUT)
  record = Record(tmp_path / 'r')
  found = interventions.replay(model, record)
  assert (found.largest_gap, found.other_predictions) == (0.0, 0)
  assert found.loss == found.recorded_loss
  assert found.tokens > 100
  if capacity:
    return
  # The routes matter: another model's own are other ones, and following the record changes it.
  banned = routed(model, 'ban=mlp:1')
  assert interventions.replay(banned, record, own_weights=True).largest_gap > 0
  recording.record(banned, texts(), tmp_path / 'b', calls, about=ABOUT)
  theirs = interventions.replay(model, Record(tmp_path / 'b'))
  assert theirs.largest_gap == 0.0


def test_logits_of_a_replay_are_equal_to_the_bit():
  """All of them, and not only what a record keeps."""
  model = case.model('jetmoe')
  forward = Forward(model, CALLS, with_probs=True)
  first = forward(ROW)
  expert = first.expert_RNk.reshape(2, 1, -1, 2)[:, :, : len(ROW[0])]
  weight = first.weight_RNk.reshape(2, 1, -1, 2)[:, :, : len(ROW[0])]
  again = forward(ROW, replay=(expert, weight))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


# --- a planted domain


def planted_model() -> LanguageModel:
  """Two domains, ids below and above 32; experts 0, 1 and 2, 3 of the router look at which.

  The dense parts add nothing, so the sparse layer is all that knows a next token.
  """
  parameters = jax.tree.map(np.array, case.parameters('openmoe'))
  d = case.SIZES['embed_dim']
  generator = np.random.default_rng(0)
  embedding = generator.normal(size=(case.V, d)).astype(np.float32)
  embedding[:, 0] = np.where(np.arange(case.V) < 32, 8.0, -8.0)
  embedding[0, 0] = -8.0  # the token that begins a row counts as high
  parameters['token_embedder']['embedding'] = embedding
  for branch in ('dense', 'sparse'):
    block = parameters['decoder'][branch]
    block['attention']['out']['kernel'][:] = 0
    block['extra_mlp' if branch == 'sparse' else 'mlp']['wo']['kernel'][:] = 0
  moe = parameters['decoder']['sparse']['moe']
  moe['router']['kernel'][:] = 0
  moe['router']['kernel'][0, 0] = [2.0, 1.9, -2.0, -1.9]
  moe['experts']['wo']['kernel'][:] *= 3
  return LanguageModel(case.CONFIGS['openmoe'], parameters, case.Numbers(), max_length=64)


def domain_texts(model) -> list[Document]:
  """Texts of either domain that the model itself continues, so that its experts help."""
  found = []
  for i in range(12):
    domain = i % 2
    start = [5 + i] if domain == 0 else [40 + i]
    generator = np.random.default_rng(i)
    low, high = (2, 32) if domain == 0 else (32, case.V)
    tokens = [*start, *generator.integers(low, high, 20).tolist()]
    found.append(Document(f'd{i}', tokens, {'domain': ('low', 'high')[domain]}))
  return found


def test_a_ban_hits_the_domain_that_uses_the_experts(tmp_path):
  model = planted_model()
  documents = domain_texts(model)
  recording.record(model, documents, tmp_path / 'r', Calls(length=32), about=ABOUT)
  study = Study(Record(tmp_path / 'r'))
  used = study.tally(0, study.labels()['domain']).sum(axis=0)
  assert (used[1] > 0).tolist() == [True, True, False, False]  # low
  assert (used[0] > 0).tolist() == [False, False, True, True]  # high
  models = {'as it is': model, 'ban': routed(model, 'ban=mlp:0,1')}
  found = interventions.measure(models, documents, Calls(length=32))
  change = found.sums[1, :, 0] - found.sums[0, :, 0]
  low = np.array([d.labels['domain'] == 'low' for d in found.documents])
  np.testing.assert_allclose(change[~low], 0.0, atol=1e-4)  # their share of a probability
  assert (np.abs(change[low]) > 1e-3).all()
  kept = interventions.keep_top(study, 0.5, 'domain')
  assert kept['top 50.0% of high'] == 'keep=mlp.1:2,3'
  same = interventions.measure(
    {'as it is': model, 'top': routed(model, kept['top 50.0% of high'])}, documents,
    Calls(length=32),
  )  # fmt: skip
  np.testing.assert_allclose((same.sums[1] - same.sums[0])[~low], 0.0, atol=1e-3)
  assert (np.abs(same.sums[1] - same.sums[0])[low, 0] > 1e-3).all()


def test_banning_the_experts_of_a_domain_raises_its_loss(tmp_path):
  """The planted experts are fitted to their domain: without them its loss is higher."""
  model = planted_model()
  documents = []
  for document in domain_texts(model):
    # What the model itself finds likely: its greedy text, read again.
    (generation,) = model.generate([document.tokens[:1]], 20)[0]
    tokens = [*document.tokens[:1], *generation.tokens]
    documents.append(Document(document.name, tokens, document.labels))
  models = {'as it is': model, 'ban': routed(model, 'ban=mlp:0,1')}
  found = interventions.measure(models, documents, Calls(length=32))
  base, banned = (s[:, 0] for s in found.sums)
  study_low = np.array([d.labels['domain'] == 'low' for d in found.documents])
  assert banned[study_low].mean() > base[study_low].mean()
  report = interventions.report(found)
  rows = {(row[0], row[1]): row for row in report.parts[0].cells}
  assert rows['as it is', 'all'][4] == '+0.0000'
  assert float(rows['ban', 'domain low'][4]) > 0
  assert report.parts[1].series[0].label == 'ban'


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    ('bann=mlp:0', "'bann=mlp:0' is no change of routing"),
    ('ban=mlp.7:0', "no router 'mlp.7'; there are: all, mlp.1"),
    ('ban=mlp:9', "'9' must be experts up to 3"),
    ('ban=mlp:0-2', 'would have 1 of 4 experts left for top_k=2'),
    ('force=all:0,1,2', 'at most top_k=2'),
    ('ban=mlp:1 force=mlp:1', 'none that is banned'),
    ('permute=mlp:0,1,2,2', 'must name every expert'),
    ('top_k=9', 'must be from 1 to num_experts=4'),
    ('top_k=x', 'must be a number'),
  ],
)
def test_wrong_words_are_refused(words, said):
  with pytest.raises(ConfigError, match=said):
    parse(case.CONFIGS['openmoe'], words)


def test_no_capacity_to_sweep_without_one():
  with pytest.raises(ConfigError, match='has no capacity'):
    parse(case.CONFIGS['jetmoe'], 'capacity_factor=0.5')


def test_a_smaller_capacity_drops_more():
  model = case.model('openmoe', capacity=True)
  dropped = []
  for factor in (4.0, 0.5):
    forward = Forward(routed(model, f'capacity_factor={factor}'),
                      Calls(capacity=True, length=16, rows=4, group_size=64))  # fmt: skip
    rows = [[0, *np.random.default_rng(i).integers(2, case.V, 15).tolist()] for i in range(4)]
    found = forward(rows)
    slots = forward.config.moe.eval_capacity_factor * 64 / 4
    dropped.append(int((found.slot_RNk >= slots).sum()))
  assert dropped[0] == 0 < dropped[1]


def test_benchmarks_are_compared_item_by_item():
  item = lambda name, value: {'name': name, 'measures': {'accuracy': value}}
  result = lambda values: {'t': {'metric': 'accuracy', 'items': [
    item(str(i), v) for i, v in enumerate(values)]}}  # fmt: skip
  (row,) = interventions.benchmark_differences(result([1, 1, 0, 1]), result([0, 1, 0, 0]))
  assert row[:6] == ['t', 'accuracy', '4', '0.7500', '0.2500', '-0.5000']
  low, high = row[6].split(' to ')
  assert float(low) <= -0.5 <= float(high)


def test_unstacked_parameters_hold_no_override():
  assert 'override' not in unstack(case.parameters('openmoe'), case.CONFIGS['openmoe'])
