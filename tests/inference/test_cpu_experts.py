"""Few tokens read the matrices of their own experts only, split by expert or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.config import Dispatch, MoEConfig
from openmoe.inference import placement
from openmoe.inference.cpu_experts import (
  MOST_TOKENS_TURNED,
  PerExpert,
  at_expert,
  run_experts,
  split_axes,
)
from openmoe.layers.moe.exchange import times
from openmoe.layers.moe.layer import make_plan
from openmoe.layers.moe.router import route

E, K, D, O = 6, 2, 8, 12  # noqa: E741 (o is the output axis)
AXES = ('act_group', None, None)


def compute(kernel, rows, segments):
  return times(rows, kernel, segments)


@pytest.mark.parametrize('tokens', [1, 3, 11, 40])
@pytest.mark.parametrize('form', ['queries', 'outputs', 'mlp'])
def test_equals_a_loop_and_reads_no_other_expert(tokens, form):
  rng = np.random.default_rng(tokens)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  shared, combine = form != 'outputs', form != 'queries'
  x = normal(tokens, 1, D) if shared else normal(tokens, 1, K, D)
  config = MoEConfig(E, K, ignore_padding=True)
  # Nobody chooses the last two; the first token is padding where there are others.
  logits = normal(tokens, 1, E) - 100.0 * (np.arange(E) >= E - 2)
  valid = np.ones((tokens, 1), bool)
  valid[0] = tokens == 1
  routing = route(jnp.asarray(logits), jnp.asarray(valid), config, None)
  kernel = normal(E, D, O)

  want = np.zeros((tokens, O) if combine else (tokens, K, O), np.float32)
  for n in range(tokens):
    for j in range(K) if valid[n, 0] else ():
      row = x[n, 0] if shared else x[n, 0, j]
      y = row @ kernel[routing.expert_index_gtk[n, 0, j]]
      if combine:
        want[n] += routing.combine_weights_gtk[n, 0, j] * y
      else:
        want[n, j] = y

  unread = jnp.asarray(kernel).at[E - 2 :].set(jnp.nan)
  axes = ('expert', None, None)
  plan = make_plan(
    Dispatch.DROPLESS, jnp.asarray(kernel), axes,
    in_axes=AXES, weight_axes=axes, out_axes=AXES, combine=combine,
  )  # fmt: skip
  run = jax.jit(lambda weights: run_experts(compute, jnp.asarray(x), weights, routing, plan))
  for weights in (unread, PerExpert(tuple(unread))):
    np.testing.assert_allclose(np.asarray(run(weights)).reshape(want.shape), want, atol=1e-5)
  turned = PerExpert(tuple(jnp.asarray(kernel)), sums=combine).turn()
  turned = turned.replace(arrays=tuple(unread))
  if tokens > 1 and tokens <= MOST_TOKENS_TURNED:  # reads all, so that none may be NaN
    assert not np.isnan(run(turned)).any()
    turned = turned.replace(arrays=tuple(jnp.full_like(x, jnp.nan) for x in turned.arrays))
  np.testing.assert_allclose(np.asarray(run(turned)).reshape(want.shape), want, atol=1e-5)


def test_stacks_and_arrays_by_expert_are_used_alike():
  stack = jnp.arange(6.0).reshape(3, 2)
  split = PerExpert(tuple(stack))
  assert split.shape == stack.shape
  assert split.astype(jnp.bfloat16).dtype == jnp.bfloat16
  for expert in range(3):
    for weights in (stack, split):
      got = at_expert(lambda w, x: w + x, weights, jnp.int32(expert), 1.0)
      np.testing.assert_array_equal(got, stack[expert] + 1)
  assert split_axes({'a': split}, {'a': ('expert', 'embed')}) == {'a': PerExpert((('embed',),) * 3)}


def test_experts_are_turned_only_while_their_copies_are_small(monkeypatch):
  arrays = (jnp.ones((3, 4)), jnp.zeros((3, 4)))
  split = {'wi_0': {'kernel': PerExpert(arrays)}, 'wo': {'kernel': PerExpert(arrays, sums=True)}}
  params = {'layer_0': {'moe': {'experts': split}}}
  experts = placement.turn_experts(params)['layer_0']['moe']['experts']
  assert experts['wi_0']['kernel'].turned.shape == (2, 4, 3)
  assert experts['wo']['kernel'].turned.shape == (4, 2, 3)
  monkeypatch.setattr(placement, 'TURNED_BYTES', 4 * 48 - 1)
  assert placement.turn_experts(params) is params
