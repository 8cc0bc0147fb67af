"""The benchmark of the sparse layer: its FLOP counter, and what it finds."""

import jax
import jax.numpy as jnp
import pytest

from scripts.benchmarks import moe_layer
from scripts.benchmarks.flops import executed_flops


def test_loops_count_as_often_as_they_run():
  a = jnp.ones((4, 6))

  def fn(count, a):
    body = lambda i, c: c + (a.T @ a).sum()
    return jax.lax.fori_loop(0, count, body, 0.0)

  once = 2 * 6 * 4 * 6
  assert [executed_flops(fn, jnp.int32(n), a) for n in (0, 1, 5)] == [0, once, 5 * once]
  assert executed_flops(jax.jit(lambda a: a @ a.T), a) == 2 * 4 * 6 * 4
  with pytest.raises(NotImplementedError, match='inside scan'):
    executed_flops(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a[:, :4], None, 2)[0], a)


@pytest.mark.slow
def test_dropless_executes_what_the_model_needs():
  for kind, factor in (('forward', 1), ('forward_backward', 3)):
    fn, args = moe_layer.programs('A', ['dropless'])[kind]['dropless']
    tokens, d, f, _ = moe_layer.SHAPES['A']
    least = factor * 6 * tokens * moe_layer.TOP_K * d * f
    assert 1.0 <= executed_flops(fn, *args) / least <= 1.1
