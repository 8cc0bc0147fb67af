"""The vocabulary-blocked loss against plain logits: values, gradients, memory, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe import partitioning
from openmoe.config import MeshConfig
from openmoe.losses import token_loss

N, D, V, Z = 64, 16, 200, 1e-2


def case():
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (N, D))
  kernel = jax.random.normal(keys[1], (D, V))
  targets = jax.random.randint(keys[2], (N,), 0, V)
  weights = (jax.random.uniform(keys[3], (N,)) < 0.7).astype(jnp.float32)
  return hidden, kernel, targets, weights


def plain(hidden, kernel, targets, weights):
  logits = hidden @ kernel
  z = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
  correct = (jnp.argmax(logits, axis=-1) == targets) * weights
  z_loss = jnp.sum(weights * Z * z**2)
  return jnp.sum(weights * (z - picked)) + z_loss, z_loss, jnp.sum(correct)


@pytest.mark.parametrize('block', [1, 48, 64, 200, 5000])
def test_blocks_equal_plain_logits(block):
  args = case()
  got = token_loss(*args, Z, block)
  want = plain(*args)
  np.testing.assert_allclose([got.total, got.logit_z_loss, got.correct], want, rtol=1e-5)
  got = jax.grad(lambda h, k: 3 * token_loss(h, k, *args[2:], Z, block).total, (0, 1))(*args[:2])
  want = jax.grad(lambda h, k: 3 * plain(h, k, *args[2:])[0], (0, 1))(*args[:2])
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('shape', [(4, 1, 2), (1, 2, 4)], ids=str)
def test_sharded_vocabulary(shape):
  args = case()
  loss = lambda h, k: token_loss(h, k, *args[2:], Z, 48).total
  want = jax.value_and_grad(loss, (0, 1))(*args[:2])
  with jax.set_mesh(partitioning.make_mesh(MeshConfig(shape[1], shape[2]))):
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(*args[:2])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5, rtol=1e-5)


def test_logits_are_never_held():
  """By the compiler's own analysis, forward and backward, with a large vocabulary."""
  n, d, v = 512, 32, 65536
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (d, v))]
  targets, weights = jnp.zeros(n, jnp.int32), jnp.ones(n)

  def temporaries(loss) -> int:
    step = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    return step.memory_analysis().temp_size_in_bytes

  blocked = temporaries(lambda h, k: token_loss(h, k, targets, weights, Z, 2048).total)
  naive = temporaries(lambda h, k: plain(h, k, targets, weights)[0])
  assert naive >= n * v * 4
  assert blocked < naive / 5
  assert blocked < n * v * 4
