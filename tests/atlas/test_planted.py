"""Planted routers give their exact answers, and every analysis runs on them."""

import numpy as np
import pytest

from openmoe.atlas import estimators
from openmoe.atlas.analyses import ANALYSES, OF_PAIRS, OF_SERIES, groups, series, tokens
from openmoe.atlas.charts import Chart, Heat, Table, draw
from openmoe.atlas.identities import identities
from openmoe.config import ConfigError
from tests.atlas import case

E, K = 32, 2


@pytest.fixture(scope='module')
def token(tmp_path_factory):
  return case.planted(tmp_path_factory.mktemp('token') / 'r', [case.by_token(E)])


@pytest.fixture(scope='module')
def position(tmp_path_factory):
  texts = case.documents(count=500, tokens=60)
  return case.planted(tmp_path_factory.mktemp('position') / 'r', [case.by_position(E)], texts=texts)


@pytest.fixture(scope='module')
def random(tmp_path_factory):
  """8 of 64 by chance, three layers: co-activation 11.1 %, as published 2.8 %."""
  routers = [case.uniform(seed=i) for i in range(3)]
  folder = tmp_path_factory.mktemp('random') / 'r'
  return case.planted(folder, routers, experts=64, k=8, texts=case.documents(40, 500))


@pytest.fixture(scope='module')
def layers(tmp_path_factory):
  routers = [case.uniform(8, 2, seed=i) for i in range(3)]
  return case.planted(tmp_path_factory.mktemp('layers') / 'r', routers, experts=8)


def everything(study, router=0, null=False):
  return study.tally(router, study.token(), null=null).sum(axis=0)


def test_a_router_of_token_ids(token):
  counts = everything(token)
  found = estimators.specialisation(counts, K)
  assert found['macro'] == found['micro'] == 1.0
  first = token.tally(0, token.token(), top=1).sum(axis=0)
  told = estimators.mutual_information(first)
  assert told['plug_in'] == pytest.approx(told['entropy'], abs=1e-9)
  assert told['normalised'] == pytest.approx(1.0, abs=0.01)
  agreement = estimators.agreement_of_pairs(counts, K)
  np.testing.assert_allclose(agreement[np.isfinite(agreement)], 1.0)
  np.testing.assert_allclose(estimators.sigma(counts), 0.1210307, atol=1e-6)
  np.testing.assert_allclose(estimators.effective_experts(counts), 2.0)


def test_the_previous_token_adds_nothing_where_the_id_decides(token):
  single, more = tokens.conditional(token, 0)
  assert single['corrected'] == pytest.approx(single['entropy'], abs=0.02)
  assert more == pytest.approx(0, abs=0.01)


def test_the_previous_token_is_found_where_it_decides(tmp_path):
  """Experts are a function of the token before: all of its information is conditional on x."""
  before = lambda t: np.concatenate([[0], t[:-1]])
  table = np.stack([np.random.default_rng(3).permutation(8)[:2] for _ in range(12)])
  texts = case.documents(40, 300, vocab=12)
  study = case.planted(tmp_path / 'r', [lambda t, p: table[before(t)]], experts=8, vocab=12,
                       texts=texts)  # fmt: skip
  single, more = tokens.conditional(study, 0)
  assert single['corrected'] == pytest.approx(0, abs=0.02)
  assert more == pytest.approx(single['entropy'], rel=0.03)


def test_a_router_of_positions(position):
  counts = position.tally(0, position.position()).sum(axis=0)
  np.testing.assert_allclose(estimators.sigma(counts), 0.1210307, atol=1e-6)
  told = estimators.mutual_information(position.tally(0, position.token(), top=1).sum(axis=0))
  null = estimators.mutual_information(
    position.tally(0, position.token(), top=1, null=True).sum(axis=0)
  )
  assert told['plug_in'] == pytest.approx(told['published_bias'], rel=0.25)
  assert told['bias'] <= told['published_bias']
  assert told['plug_in'] == pytest.approx(null['plug_in'], rel=0.1)
  assert abs(told['normalised']) < 0.05


def test_a_random_router(random, tmp_path):
  pairs, adjacent = (random.pairs(0, a).sum(axis=0) for a in (False, True))
  off = ~np.eye(64, dtype=bool)
  assert estimators.coactivation(pairs)[off].mean() == pytest.approx(7 / 63, rel=1e-3)
  assert estimators.coactivation(adjacent)[off].mean() == pytest.approx(
    1.75 / 63, rel=1e-3
  )  # 2.8 %
  other = case.planted(tmp_path / 'r', [case.uniform(seed=9)] * 3, experts=64, k=8,
                       texts=case.documents(40, 500), step=2)  # fmt: skip
  table = series.saturation_of(random, other, 0).sum(axis=0)
  assert table[0] / table[2] == pytest.approx(1 / 64, abs=0.004)
  assert table[1] / table[2] == pytest.approx(8 / 64, abs=0.004)
  key = random.labels()['source']
  domain = 8 * estimators.shares(random.tally(0, key).sum(axis=0))
  np.testing.assert_allclose(domain, 8 / 64, atol=0.02)
  np.testing.assert_allclose(domain.sum(axis=1), 8)


def test_a_record_against_itself_is_saturated(random):
  table = series.saturation_of(random, random, 1).sum(axis=0)
  assert table[0] == table[1] == table[2] == random.times.sum()


@pytest.mark.parametrize('name', ['token', 'position', 'random'])
def test_identities_hold_for_planted_routers(name, request):
  for one in identities(request.getfixturevalue(name)):
    assert one.holds, one


def test_a_hot_id_drops_from_the_position_where_its_expert_is_full(tmp_path):
  """Every token chooses experts 0 and 1: both are full after n / 8 tokens of a group of n."""
  n = 64
  texts = [case.Document(f'd{i}', [7] * (n - 1), {'source': 'a'}) for i in range(5)]
  hot = lambda token, position: np.tile([0, 1], (len(token), 1))
  study = case.planted(tmp_path / 'r', [hot], texts=texts, capacity=n // 8, group=n)
  found = study.drops(0, study.everything()).sum(axis=(0, 1))
  ratio = found[1:, 0] / found[1:, 1]
  assert (ratio[: n // 8 - 1] == 0).all()
  assert (ratio[n // 8 - 1 :] == 1).all()
  chart = groups.drops(study).parts[0]
  assert set(chart.series[0].y) == {0.0, 1.0}


def test_the_published_list_of_pairs_is_that_of_neighbouring_ranks():
  """By hand: choices (3, 1, 2) of one token, (1, 3, 0) of another."""
  expert = np.array([[3, 1, 2], [1, 3, 0]])
  published = estimators.pair_counts(expert, 4, adjacent=True)
  assert published[3, 1] == published[1, 3] == 2
  assert published[1, 2] == published[3, 0] == 1
  assert published[3, 2] == published[1, 0] == 0
  defined = estimators.pair_counts(expert, 4)
  assert defined[3, 2] == defined[1, 0] == 1
  assert np.diag(defined).tolist() == [1, 2, 1, 2]


def test_rare_ids_raise_the_published_specialisation():
  """A thousand ids seen once score 1.0; the one id that is seen often scores 1/2."""
  counts = np.zeros((1001, 4), int)
  counts[:1000, 0] = 1
  counts[1000] = [500, 500, 0, 0]
  assert estimators.specialisation(counts, 1)['macro'] > 0.99
  assert estimators.specialisation(counts, 1, least=10)['macro'] == 0.5


def test_shuffling_keeps_the_load_of_every_rank():
  generator = np.random.default_rng(0)
  expert = np.stack([generator.integers(0, 3, 500), generator.integers(3, 6, 500)], axis=1)
  mixed = estimators.shuffled(expert, generator)
  assert (mixed != expert).any()
  for rank in (0, 1):
    np.testing.assert_array_equal(np.sort(mixed[:, rank]), np.sort(expert[:, rank]))


def test_intervals_are_over_documents():
  """Counts that vary between documents have a wide interval, however many tokens they hold."""
  same = np.tile([500, 500], (40, 1))
  apart = np.array([[1000, 0], [0, 1000]] * 20)
  low, high = estimators.interval(apart, estimators.shares)
  assert 0.2 < high[0] - low[0] < 0.45
  low, high = estimators.interval(same, estimators.shares)
  assert high[0] - low[0] == pytest.approx(0)


def test_experts_of_another_order_are_matched(token, tmp_path):
  permuted = np.random.default_rng(5).permutation(E)
  original = case.by_token(E)
  other = case.planted(
    tmp_path / 'r', [lambda t, p: permuted[original(t, p)]], step=2, checkpoint='other'
  )
  a, b = (series._profiles(study, 0) for study in (token, other))
  partner, matched, chance = estimators.matching(a, b)
  used = np.abs(a).sum(axis=1) > 0
  np.testing.assert_array_equal(partner[used], permuted[used])
  assert matched > 0.9 > 0.3 > chance


def test_other_tokens_are_not_compared(token, position):
  with pytest.raises(ConfigError, match='documents; record the same data'):
    series.saturation([token, position])


@pytest.mark.parametrize('name', ['token', 'layers'])
def test_every_analysis_of_one_record_runs(name, request):
  study = request.getfixturevalue(name)
  for label, analysis in ANALYSES.items():
    found = analysis(study)
    if found is None:
      assert label in ('drops', 'balance', 'coupling', 'attention', 'flow')
      continue
    assert found.means
    assert found.means_not
    for part in found.parts:
      assert isinstance(part, Chart | Heat | Table)
      assert part.rows()
      assert part.estimator in (estimators.AS_DEFINED, estimators.AS_PUBLISHED)


def test_every_analysis_of_two_records_runs(random, tmp_path):
  other = case.planted(tmp_path / 'r', [case.uniform(seed=9 + i) for i in range(3)], experts=64,
                       k=8, texts=case.documents(40, 500), step=2)  # fmt: skip
  for analysis in (*OF_SERIES.values(), *OF_PAIRS.values()):
    found = analysis([random, other])
    assert all(part.rows() for part in found.parts)
  drawn = draw(series.saturation([random, other]).parts[0])
  assert drawn.axes
