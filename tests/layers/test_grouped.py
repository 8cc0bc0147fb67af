"""Every grouped-matmul kernel against loops: values, gradients, empty experts, unrouted rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from openmoe import partitioning
from openmoe.config import Dispatch, MeshConfig, MoEConfig
from openmoe.layers.dense import DOUBLE_SWIGLU
from openmoe.layers.moe import exchange as dispatching
from openmoe.layers.moe import layer as moe
from openmoe.layers.moe.grouped import blocked
from openmoe.layers.moe.grouped.api import Kernel, block_layout, grouped_matmul, grouped_mlp
from openmoe.models.jetmoe import SWIGLU

E, D, F, ROWS = 5, 128, 128, 300
KERNELS = (Kernel.BLOCKED, Kernel.MEGABLOX, Kernel.PADDED)  # Mosaic GPU needs a Hopper GPU


def experts_of_rows(rows=ROWS) -> np.ndarray:
  """Uneven; expert 2 is empty, and E marks rows that are not routed."""
  rng = np.random.default_rng(0)
  return rng.choice([0, 1, 3, 4, E], p=[0.6, 0.2, 0.05, 0.1, 0.05], size=(rows, 1))


def arrays():
  rng = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)
  return normal(ROWS, D) * 10, normal(E, D, F), normal(ROWS, F)


def loops(x, w, expert):
  y = np.zeros((len(x), w.shape[2]))
  for row, e in enumerate(expert[:, 0]):
    if e < E:
      y[row] = np.asarray(x[row], np.float64) @ np.asarray(w[e], np.float64)
  return y


@pytest.mark.parametrize('kernel', KERNELS)
def test_values_and_gradients(kernel):
  x, w, probe = arrays()
  expert = experts_of_rows()

  def run(x, w):
    slots, segments = block_layout(jnp.asarray(expert, jnp.int32), E, kernel)
    out = grouped_matmul(dispatching.dispatch(x, slots), w, segments)
    return dispatching.collect(out, slots)[:, 0]

  np.testing.assert_allclose(jax.jit(run)(x, w), loops(x, w, expert), atol=2e-4)
  dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sum(run(x, w) * probe), argnums=(0, 1)))(x, w)
  transposed = np.asarray(w).swapaxes(1, 2)
  np.testing.assert_allclose(dx, loops(probe, transposed, expert), atol=2e-4)
  for e in range(E):
    mine = expert[:, 0] == e
    want = np.asarray(x, np.float64)[mine].T @ np.asarray(probe, np.float64)[mine]
    np.testing.assert_allclose(dw[e], want, atol=1e-3)
  assert not np.asarray(dw[2]).any()


@pytest.mark.parametrize('gating', [SWIGLU, DOUBLE_SWIGLU], ids=['swiglu', 'double'])
def test_fused_mlp_equals_three_matmuls(gating):
  """The CPU's one-pass MLP against the composition that other kernels use, with dropout."""
  rng = np.random.default_rng(2)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)
  x, wi_0, wo = normal(ROWS, 16) * 4, normal(E, 16, 48), normal(E, 24, 16)
  wi_1 = normal(E, 16, 24) if gating.has_linear else None
  keep = jnp.asarray(rng.integers(0, 2, (E, 24)), jnp.float32)
  expert = jnp.asarray(experts_of_rows(), jnp.int32)

  def run(weights, kernel):
    x, wi_0, wi_1, wo = weights
    slots, segments = block_layout(expert, E, kernel)
    rows = dispatching.dispatch(x, slots)
    out = grouped_mlp(rows, wi_0, wi_1, wo, keep, segments, gating.activation)
    return jnp.sum(jnp.sin(dispatching.collect(out, slots)))

  weights = (x, wi_0, wi_1, wo)
  got = jax.jit(jax.value_and_grad(lambda w: run(w, Kernel.BLOCKED)))(weights)
  want = jax.jit(jax.value_and_grad(lambda w: run(w, Kernel.PADDED)))(weights)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
  assert float(jnp.abs(got[1][1]).sum()) > 1


@pytest.mark.parametrize('counts', [(0, 0, 0), (1, 0, 700), (512, 33, 8), (100, 64, 1000)])
def test_chunks_cover_every_row_once(counts):
  sizes = (512, 128, 32, 8)
  rows_e = -(-np.asarray(counts) // 8) * 8
  start_e = np.cumsum(rows_e) - rows_e
  owner = np.full(rows_e.sum(), -1)
  parts = blocked.chunks(jnp.asarray(start_e), jnp.asarray(rows_e), sizes, rows_e.sum() + 8)
  for part in parts:
    assert int(part.count) <= part.start_C.size
    for c in range(int(part.count)):
      rows = slice(int(part.start_C[c]), int(part.start_C[c]) + part.size)
      assert (owner[rows] == -1).all()
      owner[rows] = int(part.expert_C[c])
  np.testing.assert_array_equal(owner, np.repeat(np.arange(3), rows_e))


@pytest.mark.parametrize(('rows', 'experts'), [(8192, 16), (100, 8), (2, 8), (1 << 20, 8)])
def test_padding_is_little(rows, experts):
  align = blocked.ladder(rows, experts)[-1]
  assert align == 8 or (align - 1) * experts <= rows / 16 + experts


@pytest.mark.parametrize(
  ('device', 'model_partitions', 'kernel'),
  [
    (AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu'), 1, Kernel.MOSAIC_GPU),
    (AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu'), 8, Kernel.PADDED),  # 704 % 128 != 0
    (AbstractDevice('NVIDIA A100-SXM4-80GB', None, 'gpu'), 1, Kernel.PADDED),
    (AbstractDevice('TPU v4', None, 'tpu'), 8, Kernel.MEGABLOX),
    (AbstractDevice('cpu', None, 'cpu'), 8, Kernel.BLOCKED),
  ],
)
def test_the_kernel_is_chosen_for_the_mesh_and_the_sides_of_a_shard(
  device, model_partitions, kernel
):
  """The devices of the mesh need not be here."""
  wo_eIO = jax.ShapeDtypeStruct((8, 5632, 2048), jnp.bfloat16)
  axes = ('expert', 'expert_mlp', None)
  mesh = jax.sharding.AbstractMesh(
    (1, 1, model_partitions), partitioning.MESH_AXES, abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    plan = moe.make_plan(
      Dispatch.DROPLESS, wo_eIO, axes, in_axes=(), weight_axes=(), out_axes=(), combine=True
    )
  assert plan.move.keywords['kernel'] is kernel
  assert plan.typed is not kernel.untyped


@pytest.mark.slow
@pytest.mark.parametrize('partitions', [1, 2, 4])
def test_a_pallas_kernel_under_a_mesh(monkeypatch, partitions):
  """Its outputs carry no manual-axis types, so gradients of shared weights need their own path."""
  monkeypatch.setattr(moe, 'choose_kernel', lambda *target: Kernel.MEGABLOX)
  config = MoEConfig(4, group_size=8, dispatch='dropless')
  layer = moe.MoeLayer(config, F, jnp.float32, moe.scaled_init(1.0), gating=SWIGLU)
  x = jax.random.normal(jax.random.key(0), (8, 8, D))
  params = nn.unbox(layer.init(jax.random.key(1), x, None, False))['params']
  loss = lambda p, x: jnp.sum(jnp.sin(layer.apply({'params': p}, x, None, True)[0]))
  grad = lambda: jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
  want = grad()
  with jax.set_mesh(partitioning.make_mesh(MeshConfig(num_expert_partitions=partitions))):
    got = grad()
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4)
