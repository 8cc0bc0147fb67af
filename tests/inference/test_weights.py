"""Forms of the weights: int8 against its own definition, experts that lie elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.config import ConfigError
from openmoe.inference import int8
from openmoe.inference.model import LanguageModel
from openmoe.inference.offload import Store
from openmoe.inference.placement import expert_form
from openmoe.models.decoding import is_expert_kernel, unstack
from tests.inference import case

PROMPTS = [[5, 6, 7], [9], [4, 4, 8, 9, 10, 11, 12]]


def rounded(name: str) -> LanguageModel:
  """A float32 model of the numbers that the int8 model's kernels mean."""
  config = case.CONFIGS[name]
  held = int8.quantised(unstack(case.parameters(name), config), config, 'int8')

  def wide(path, leaf):
    if not int8.is_int8(leaf):
      return leaf
    names = '/'.join(key.key for key in path)
    inputs = 1 if is_expert_kernel(names, config) or 'embedding' in names else 0
    return leaf.values * jnp.expand_dims(leaf.scale, inputs)

  params = jax.tree_util.tree_map_with_path(wide, held, is_leaf=int8.is_int8)
  return LanguageModel(config, params, case.Numbers(), max_length=64, batch_rows=4, unstacked=True)


@pytest.mark.parametrize(('inputs', 'rows'), [(7, 1), (71, 4), (32, 9)])
def test_products_are_those_of_the_numbers_that_int8_means(inputs, rows):
  rng = np.random.default_rng(0)
  kernel, x = rng.normal(size=(3, inputs, 2, 5)), rng.normal(size=(rows, inputs))
  x = jnp.asarray(x, jnp.float32)
  held = int8.quantise(kernel, 1)
  assert held.values.dtype == jnp.int8 and held.scale.shape == (3, 2, 5)
  meant = np.asarray(held.values) * np.asarray(held.scale)[:, None]
  # No number is further away than half a step.
  assert np.abs(meant - kernel).max() <= np.abs(kernel).max(axis=1).max() / 127 / 2 * 1.001
  expected = np.einsum('ri,eiuf->eruf', x, meant)
  one = jax.jit(lambda x, held, e: x @ held.at_expert(e))(x, held, jnp.int32(2))
  np.testing.assert_allclose(one, expected[2], rtol=1e-5, atol=1e-5)
  every = held.batched(jnp.broadcast_to(x, (3, *x.shape)))
  np.testing.assert_allclose(every, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['openmoe', 'jetmoe'])
def test_int8_answers_as_its_numbers_in_float32_do(name):
  options = {'max_length': 64, 'batch_rows': 4, 'weights': 'int8'}
  model = LanguageModel(case.CONFIGS[name], case.parameters(name), case.Numbers(), **options)
  same = rounded(name)
  assert [g[0].tokens for g in model.generate(PROMPTS, 6)] == [
    g[0].tokens for g in same.generate(PROMPTS, 6)
  ]
  requests = [(p[:1], [*p[1:], 5, 9]) for p in PROMPTS]
  for ours, theirs in zip(model.score(requests), same.score(requests), strict=True):
    np.testing.assert_allclose(ours.token_log_probs, theirs.token_log_probs, atol=2e-4)
  assert model.fingerprint != same.fingerprint
  kernels = [x for x in jax.tree.leaves(model.params) if x.dtype == jnp.int8]
  # Router, norms, biases and scales are all that is wider.
  assert all(x.size <= case.V * 4 for x in jax.tree.leaves(model.params) if x.dtype != jnp.int8)
  assert sum(x.size for x in kernels) > 1000


def test_bytes_a_token_count_what_is_read():
  config = case.CONFIGS['openmoe']
  model = case.model('openmoe')
  e, d, f, v, inner = 4, 16, 16, case.V, 4 * 4
  attention = 4 * d * inner
  mlp = 3 * f * d + f * d
  norms = 2 * d * 2 + d + d
  numbers = 2 * attention + 2 * mlp + 2 * mlp + norms + d * e + d * v + d
  assert int8.bytes_a_token(model.params, config) == 4 * numbers
  held = int8.quantised(unstack(case.parameters('openmoe'), config), config, 'int8')
  assert int8.bytes_a_token(held, config) < 0.45 * 4 * numbers  # scales weigh much at width 16


@pytest.mark.parametrize('name', ['openmoe', 'jetmoe'])
@pytest.mark.parametrize('fits', [0, 4])
def test_experts_that_lie_elsewhere_give_the_same_tokens(name, fits):
  config, there = case.CONFIGS[name], case.model(name)
  largest = 16 * 2 * 16 * 4
  store = Store(None if not fits else fits * largest)
  params = jax.tree.map(np.asarray, case.parameters(name))
  form = expert_form(config, None, False, store=store)
  options = {'max_length': 64, 'batch_rows': 4, 'unstacked': True}
  model = LanguageModel(config, unstack(params, config, form), case.Numbers(), **options)
  assert model.store is store and store.bytes > fits * largest
  for prompts in ([PROMPTS[0]], PROMPTS):
    theirs = there.generate(prompts, 6)
    assert [g[0].tokens for g in model.generate(prompts, 6)] == [g[0].tokens for g in theirs]
  assert model.fingerprint == there.fingerprint
  if fits:
    assert 0 < store.traffic.peak_bytes <= store.budget
    assert store.traffic.hits and store.traffic.misses and store.traffic.ahead


def test_forms_that_cannot_be_are_refused():
  with pytest.raises(ConfigError, match="weights='int4' is not one of"):
    LanguageModel(
      case.CONFIGS['openmoe'], case.parameters('openmoe'), case.Numbers(), weights='int4'
    )
  with pytest.raises(ConfigError, match="weights='int8' lie on one device, and this mesh has 8"):
    case.model('openmoe', 1, weights='int8')
  with pytest.raises(ConfigError, match='expert_budget=10 bytes does not hold 3 kernels of 4'):
    Store(10).add(np.zeros((2, 1), np.float32), np.float32)
