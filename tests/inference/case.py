"""Tiny models of random weights for tests of generation, and a vocabulary of numbers."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from openmoe.config import ModelConfig, MoEConfig
from openmoe.inference.model import LanguageModel
from openmoe.inference.placement import inference_mesh
from openmoe.models import build_model, empty_batch
from openmoe.types import Batch

V = 64
SIZES = {'vocab_size': V, 'embed_dim': 16, 'mlp_dim': 16, 'head_dim': 4, 'dtype': 'float32'}
CONFIGS = {
  'openmoe': ModelConfig(
    'openmoe', num_layers=2, num_heads=4, num_sparse_layers=1, moe=MoEConfig(4), init_scale=1.0,
    **SIZES,
  ),
  'jetmoe': ModelConfig(
    'jetmoe', num_layers=1, num_heads=2, num_sparse_layers=1, architecture='jetmoe', init_std=0.4,
    moe=MoEConfig(
      4, dispatch='dropless', router_order='top_k_softmax', router_loss='sum', ignore_padding=True
    ),
    **SIZES,
  ),
}  # fmt: skip


class Numbers:
  """Every id is a character; ids from 'a' on, so that texts can be read."""

  eos_id, pad_id = 1, 0

  def encode(self, text: str) -> list[int]:
    return [ord(c) - 60 for c in text]

  def decode(self, ids) -> str:
    return ''.join(chr(60 + int(i)) for i in ids)


@functools.cache
def parameters(name: str):
  """The scanned tree."""
  module = build_model(CONFIGS[name])
  init = jax.jit(lambda: nn.unbox(module.init(jax.random.key(3), empty_batch(1, 8), train=False)))
  return init()['params']


@functools.cache
def model(name: str, partitions: int = 0, **options) -> LanguageModel:
  """A model of CONFIGS; with `partitions`, on all devices, kernels split so often."""
  mesh = inference_mesh(CONFIGS[name], jax.devices(), partitions) if partitions else None
  options = {'max_length': 64, 'batch_rows': 4} | options
  return LanguageModel(CONFIGS[name], parameters(name), Numbers(), mesh=mesh, **options)


@functools.cache
def _full(name: str):
  config = CONFIGS[name]
  moe = dataclasses.replace(
    config.moe, dispatch='dropless', ignore_padding=True, group_size=2**31 - 1
  )
  module = build_model(dataclasses.replace(config, moe=moe))
  return jax.jit(lambda p, batch: module.apply({'params': p}, batch, train=False).logits())


def full_logits(name: str, prompt, length: int = 24) -> np.ndarray:
  """[tokens + 1, v] of the training forward pass: row i is about the token behind i."""
  row = [0, *prompt]
  tokens = jnp.asarray([row + [2] * (length - len(row))], jnp.int32)
  ones = jnp.ones_like(tokens)
  # Targets only say which positions are real.
  batch = Batch(tokens, ones, ones.astype(jnp.float32), ones, jnp.arange(length)[None])
  return np.asarray(_full(name)(parameters(name), batch)[0, : len(row)])


def full_greedy(name: str, prompt, count: int) -> list[int]:
  """Greedy continuation by the training forward pass, up to EOS."""
  new: list[int] = []
  for _ in range(count):
    token = int(full_logits(name, [*prompt, *new])[-1].argmax())
    if token == Numbers.eos_id:
      break
    new.append(token)
  return new
