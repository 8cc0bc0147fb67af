"""The decoder: parameter tree, masks, rounding of the residual, program size."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from openmoe.config import Dispatch, ModelConfig, MoEConfig
from openmoe.inference.decode import inference_config
from openmoe.layers.dense import packed_mask
from openmoe.models import abstract_params, build_model, empty_batch
from openmoe.models.openmoe import Residual, token_mask
from openmoe.types import Batch

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'parameter_tree.json'


def small(**changes) -> ModelConfig:
  moe = MoEConfig(4, group_size=32, dispatch=Dispatch.SCATTER)
  fields = {'vocab_size': 96, 'num_layers': 4, 'embed_dim': 16, 'mlp_dim': 24, 'num_heads': 3}
  fields |= {'head_dim': 8, 'num_sparse_layers': 2, 'moe': moe, 'dtype': 'float32'}
  return ModelConfig('small', **(fields | changes))


def initialised(config: ModelConfig):
  module = build_model(config)
  # Everything is jitted: op by op, compilation of single operations takes most of a minute.
  init = jax.jit(lambda: nn.unbox(module.init(jax.random.key(0), empty_batch(1, 8), train=False)))
  params = init()['params']
  # Larger than the released initialisers, so that every path moves the logits.
  return module, jax.tree.map(lambda p: p * 3 if p.ndim > 3 else p, params)


def jitted_logits(module):
  return jax.jit(lambda p, batch: module.apply({'params': p}, batch, train=False).logits())


def text_batch(tokens: np.ndarray) -> Batch:
  """Rows of one example each, no padding."""
  tokens = jnp.asarray(tokens)
  inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
  ones = jnp.ones_like(tokens)
  return Batch(inputs, tokens, ones.astype(jnp.float32), ones, ones)


def test_golden_parameter_tree():
  """Path -> shape, dtype, axes. Other parameters orphan checkpoints: decide it in review."""
  shapes, axes = abstract_params(small())
  flat, names = (flax.traverse_util.flatten_dict(t, sep='/') for t in (shapes, axes))
  got = {path: [*leaf.shape, str(leaf.dtype), *names[path]] for path, leaf in sorted(flat.items())}
  assert got == json.loads(GOLDEN.read_text())


def test_token_mask_counts_the_leading_zero_as_real():
  inputs = jnp.array([[0, 5, 6, 0, 7, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
  assert token_mask(inputs).tolist() == [
    [True, True, True, True, True, False, False, False],
    [True, False, False, False, False, False, False, False],
  ]


def test_attention_stays_inside_a_segment():
  batch = empty_batch(1, 4).replace(
    targets=jnp.array([[4, 5, 6, 0]]), segment_ids=jnp.array([[1, 1, 2, 0]])
  )
  want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  assert packed_mask(batch.segment_ids, batch.targets > 0)[0].astype(int).tolist() == want


def test_packed_segments_do_not_see_each_other():
  """Another first segment leaves the second one's logits alone (no capacity: no competition)."""
  config = inference_config(small())
  module, params = initialised(config)
  logits_of = jitted_logits(module)
  rng = np.random.default_rng(0)
  a, b = rng.integers(1, 96, (2, 12))
  b[6:] = a[6:]
  logits = []
  for tokens in (a, b):
    batch = text_batch(tokens[None])
    segments = jnp.where(jnp.arange(12) < 6, 1, 2)[None]
    inputs = jnp.where(jnp.arange(12) == 6, 0, batch.inputs)
    batch = batch.replace(inputs=inputs, segment_ids=segments)
    logits.append(logits_of(params, batch)[0, 6:])
  np.testing.assert_allclose(*logits, atol=1e-5)


def test_residual_is_rounded_only_before_the_first_sparse_layer():
  config = small(dtype='bfloat16')
  r = jax.random.normal(jax.random.key(0), (1, 4, 8))
  y = jax.random.normal(jax.random.key(1), (1, 4, 8)).astype(jnp.bfloat16)
  add = lambda narrow: Residual(config).apply({}, r, y, jnp.array(narrow), False)
  exact = r + y.astype(jnp.float32)
  np.testing.assert_array_equal(add(False), exact)
  np.testing.assert_array_equal(add(True), exact.astype(jnp.bfloat16).astype(jnp.float32))


def test_dropout_and_remat_keep_the_program_running():
  batch = text_batch(np.random.default_rng(0).integers(1, 96, (2, 32)))
  outputs = []
  for remat in ('none', 'dots', 'full'):
    config = small(remat=remat, dropout_rate=0.2)
    module, params = initialised(config)

    def loss(p, module=module):
      rngs = {'dropout': jax.random.key(3)}
      return jnp.sum(module.apply({'params': p}, batch, train=True, rngs=rngs).hidden_btd ** 2)

    outputs.append(jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
  for other in outputs[1:]:
    for a, b in zip(outputs[0], other, strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)


def test_program_does_not_grow_with_depth():
  """12 against 24 layers in the released pattern, every sixth sparse: one body for all."""

  def size(layers: int) -> int:
    config = small(num_layers=layers, num_sparse_layers=layers // 6, remat='full')
    module, shapes = build_model(config), abstract_params(config)[0]
    run = lambda p: jnp.sum(module.apply({'params': p}, empty_batch(2, 32), train=True).hidden_btd)
    return len(jax.jit(jax.grad(run)).lower(shapes).as_text())

  assert size(24) < 1.05 * size(12)


def test_group_size_is_what_the_config_says():
  config = small()
  assert dataclasses.replace(config, moe=None, num_sparse_layers=0).sparse_layers == ()
  assert config.sparse_layers == (1, 3)
