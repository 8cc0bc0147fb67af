"""Compares this model with transformers' JetMoeForCausalLM of the same random weights.

  python -m tests.parity.jetmoe --layers 2 --embed 32 --heads 2 --head_dim 8 --experts 4 \\
    --top_k 2 --mlp 48 --vocab 64 --seed 0 [--json]

Import and export are those of `python -m convert`, through files. Needs the `torch` extra.
--heads are key-value heads; there are top_k times as many query heads.
Printed:
  logits             largest absolute difference of float32 logits, limit 1e-5
  cached_decode      the same between our cached decoding, token by token after a prefill, and our
                     full forward pass, limit 1e-5
  export_mismatches  tensors not bit-exact after export back, missing or superfluous, limit 0
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np

from convert.load import load_params
from convert.run import Options, convert, find_form
from convert.sizes import of_form
from openmoe.checkpoint.description import model_fields
from openmoe.config import ModelConfig
from openmoe.inference.decode import inference_config
from openmoe.models import build_model
from openmoe.models.decoding import init_decode_cache, unstack
from openmoe.types import Batch, PyTree

LIMITS = {'logits': 1e-5, 'cached_decode': 1e-5, 'export_mismatches': 0}
ROWS, LENGTH, PREFILL = 2, 24, 9


def random_hf_model(sizes: Mapping[str, int], seed: int, num_labels: int | None = None):
  """A float32 JetMoe model on CPU with logits of order 0.3; num_labels makes a classifier."""
  import torch
  from transformers import JetMoeConfig, JetMoeForCausalLM, JetMoeForSequenceClassification

  torch.manual_seed(seed)
  config = JetMoeConfig(
    num_hidden_layers=sizes['layers'],
    hidden_size=sizes['embed'],
    num_key_value_heads=sizes['heads'],
    kv_channels=sizes['head_dim'],
    num_local_experts=sizes['experts'],
    num_experts_per_tok=sizes['top_k'],
    intermediate_size=sizes['mlp'],
    vocab_size=sizes['vocab'],
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,
    attn_implementation='eager',
    **({} if num_labels is None else {'num_labels': num_labels, 'pad_token_id': 0}),
  )
  cls = JetMoeForCausalLM if num_labels is None else JetMoeForSequenceClassification
  model = cls(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      # The initialisation there (0.01, biases 0, norms 1) would hide most mistakes.
      if parameter.ndim == 1:
        parameter.normal_(1.0 if 'norm' in name else 0.0, 0.1)
      else:
        # A language model's own logits are small when it knows nothing; float32 errors are too.
        scale = 0.3 if 'embed_tokens' in name else 1.0
        parameter.normal_(0.0, scale * parameter.shape[-1] ** -0.5)
  return model


def hf_tensors(model) -> dict[str, np.ndarray]:
  """Its parameters; the tied output layer is not repeated."""
  return {
    name: value.detach().numpy()
    for name, value in model.state_dict().items()
    if name != 'lm_head.weight'
  }


def there_and_back(hf, place: pathlib.Path) -> tuple[ModelConfig, PyTree, dict[str, np.ndarray]]:
  """(configuration, parameters, tensors after export back) of a model saved by transformers."""
  from transformers.utils import logging

  logging.disable_progress_bar()
  hf.save_pretrained(place / 'hf')
  config = dataclasses.replace(of_form(find_form(place / 'hf'), None), dtype='float32')
  model, options = place / 'model.json', Options()
  model.write_text(json.dumps(model_fields(config)))
  convert(find_form(place / 'hf'), 'ours', place / 'run', str(model), options)
  params = load_params(find_form(place / 'run'), config)
  convert(find_form(place / 'run'), 'hf', place / 'back', str(model), options)
  back = find_form(place / 'back').tensors()
  return config, params, {name: stored.whole() for name, stored in back.items()}


def full_batch(tokens_bt: np.ndarray) -> Batch:
  """Rows without padding, one segment each."""
  tokens = jnp.asarray(tokens_bt, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  ones = jnp.ones(tokens.shape, jnp.int32)
  return Batch(tokens, tokens, ones.astype(jnp.float32), ones, positions)


def cached_logits(params: PyTree, config: ModelConfig, tokens_bt: np.ndarray) -> np.ndarray:
  """Logits of every position, by a prefill of PREFILL tokens and single steps."""
  config = inference_config(config)
  model, params = build_model(config), unstack(params, config)
  step = jax.jit(lambda *args: _logits_and_cache(model, params, *args))
  b, t = tokens_bt.shape
  cache, parts = init_decode_cache(config, b, t), []
  ends = [min(PREFILL, t), *range(PREFILL + 1, t + 1)]
  for start, end in zip([0, *ends], ends, strict=False):
    positions = jnp.broadcast_to(jnp.arange(start, end), (b, end - start))
    mask = jnp.arange(t) <= positions[..., None]
    logits, cache = step(jnp.asarray(tokens_bt[:, start:end]), positions, mask, cache, start)
    parts.append(np.asarray(logits))
  return np.concatenate(parts, axis=1)


def _logits_and_cache(model, params, *args):
  out = model.apply({'params': params}, *args, method='decode')
  return out.logits(), out.cache


def mismatches(tensors: Mapping[str, np.ndarray], back: Mapping[str, np.ndarray]) -> int:
  """Names on one side only, and tensors that differ in any bit or in their shape."""
  same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
  both = tensors.keys() & back.keys()
  return len(tensors.keys() ^ back.keys()) + sum(not same(tensors[n], back[n]) for n in both)


def compare(sizes: Mapping[str, int], seed: int) -> dict[str, float | int]:
  """All differences, see the module's docstring."""
  import torch

  hf = random_hf_model(sizes, seed)
  with tempfile.TemporaryDirectory() as place:
    config, params, back = there_and_back(hf, pathlib.Path(place))
  tokens = np.random.default_rng(seed).integers(0, sizes['vocab'], (ROWS, LENGTH))
  with torch.no_grad():
    theirs = hf(torch.from_numpy(tokens)).logits.numpy()
  ours = build_model(config).apply({'params': params}, full_batch(tokens), train=False).logits()
  return {
    'logits': float(np.max(np.abs(np.asarray(ours) - theirs))),
    'cached_decode': float(np.max(np.abs(cached_logits(params, config, tokens) - ours))),
    'export_mismatches': mismatches(hf_tensors(hf), back),
    'logit_scale': float(np.std(theirs)),
    'tensors': len(back),
  }


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  names = ('layers', 'embed', 'heads', 'head_dim', 'experts', 'top_k', 'mlp', 'vocab')
  for name, value in zip(names, (2, 32, 2, 8, 4, 2, 48, 64), strict=True):
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  result = compare({name: getattr(args, name) for name in names}, args.seed)
  if args.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      limit = LIMITS.get(name)
      verdict = '' if limit is None else f'  limit {limit:g}  {"ok" if value <= limit else "NO"}'
      print(f'{name:18} {value:.4g}{verdict}')
  return int(any(result[name] > limit for name, limit in LIMITS.items()))


if __name__ == '__main__':
  raise SystemExit(main())
