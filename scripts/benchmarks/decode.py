"""Speed of generation: python -m scripts.benchmarks.decode [--shapes tiny small] [--json].

JetMoE of random weights, ours against transformers' JetMoeForCausalLM with the same weights, on the
same device in one run: greedy, float32, prefill included. The two must give the same tokens. Rounds
are interleaved, medians are over rounds after one of warm-up; compilation is reported by itself.
CPU time and load are reported beside: a shared machine's milliseconds mean little.

`same_tokens` compares the first tokens of every row up to a near tie: where the two largest logits
are closer than float32 rounding, either may win. Needs the `torch` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax
import numpy as np

from convert.core.source import find_form
from convert.load import load_params
from convert.sizes import of_form
from openmoe.inference.model import LanguageModel

NAMES = ('layers', 'embed', 'heads', 'head_dim', 'experts', 'top_k', 'mlp', 'vocab')
# heads are key-value heads; there are top_k times as many query heads.
SHAPES = {
  'tiny': (4, 128, 2, 32, 8, 2, 256, 2048),  # gin/models/jetmoe_tiny.gin
  'small': (6, 256, 4, 64, 8, 2, 704, 8192),
  'medium': (8, 512, 8, 64, 8, 2, 1408, 32000),
}
GOAL = 1.5


class Ids:
  """A vocabulary of numbers, without an end: every row runs to its length."""

  eos_id, pad_id = -1, 0

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids) -> str:
    return ' '.join(map(str, ids))


def torch_model(sizes: Mapping[str, int], seed: int):
  """transformers' model with random weights, in float32."""
  import torch
  from transformers import JetMoeConfig, JetMoeForCausalLM

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
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
  )
  model = JetMoeForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim > 1:  # its own 0.01 would give the same token for ever
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
  return model


def our_model(theirs, max_length: int) -> LanguageModel:
  """The same weights as a LanguageModel."""
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    form = find_form(folder)
    config = dataclasses.replace(of_form(form, None), dtype='float32')
    params = load_params(form, config)
  return LanguageModel(
    config, jax.tree.map(jax.numpy.asarray, params), Ids(), max_length=max_length
  )


def timed(fn: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
  wall, cpu = time.perf_counter(), time.process_time()
  out = fn()
  return time.perf_counter() - wall, time.process_time() - cpu, out


def same(ours: np.ndarray, theirs: np.ndarray, theirs_logits: Callable) -> bool:
  """Whether rows agree, or first differ at a near tie."""
  for mine, other in zip(ours, theirs, strict=True):
    differ = np.flatnonzero(mine != other)
    if differ.size:
      logits = np.sort(theirs_logits(other[: differ[0]]))
      if logits[-1] - logits[-2] > 1e-4:
        return False
  return True


def measure(
  shape: str, batch: int, prompt: int, new: int, rounds: int, seed: int
) -> dict[str, Any]:
  """Figures of one shape and batch size."""
  import torch

  sizes = dict(zip(NAMES, SHAPES[shape], strict=True))
  theirs = torch_model(sizes, seed)
  ours = our_model(theirs, prompt + new)
  rows = np.random.default_rng(seed).integers(1, sizes['vocab'], (batch, prompt))
  rows[:, 0] = ours.start_id
  prompts, tensor = rows[:, 1:].tolist(), torch.from_numpy(rows)

  def run_ours() -> np.ndarray:
    return np.array([found[0].tokens for found in ours.generate(prompts, new)])

  @torch.no_grad()
  def run_theirs() -> np.ndarray:
    out = theirs.generate(
      tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=new, do_sample=False
    )
    return out[:, prompt:].numpy()

  first, _, mine = timed(run_ours)
  other = run_theirs()

  @torch.no_grad()
  def logits(row: int, after: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate([rows[row], after]))[None]
    return theirs(ids).logits[0, -1].numpy()

  agree = all(
    same(mine[i : i + 1], other[i : i + 1], lambda after, i=i: logits(i, after))
    for i in range(batch)
  )
  times: dict[str, list[tuple[float, float]]] = {'ours': [], 'transformers': []}
  for _ in range(rounds):
    for name, run in (('ours', run_ours), ('transformers', run_theirs)):
      wall, cpu, _ = timed(run)
      times[name].append((wall, cpu))
  median = lambda name, i: statistics.median(t[i] for t in times[name])
  speed = lambda name: round(batch * new / median(name, 0), 1)
  pairs = zip(times['transformers'], times['ours'], strict=True)
  return {
    'shape': shape,
    **sizes,
    'batch': batch,
    'prompt': prompt,
    'new_tokens': new,
    'parameters': sum(x.numel() for x in theirs.parameters()),
    'tokens_per_second': speed('ours'),
    'transformers_tokens_per_second': speed('transformers'),
    'ratio': round(statistics.median(b[0] / a[0] for b, a in pairs), 2),
    'cpu_seconds': round(median('ours', 1), 3),
    'transformers_cpu_seconds': round(median('transformers', 1), 3),
    'compile_seconds': round(first - median('ours', 0), 1),
    'same_tokens': agree,
  }


def main(argv: list[str] | None = None) -> int:
  import torch
  import transformers

  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shapes', nargs='+', choices=SHAPES, default=['tiny', 'small'])
  parser.add_argument('--batches', nargs='+', type=int, default=[1, 8])
  parser.add_argument('--prompt', type=int, default=64, help='tokens of a prompt')
  parser.add_argument('--new_tokens', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  transformers.logging.set_verbosity_error()
  result = {
    'backend': jax.default_backend(),
    'torch_threads': torch.get_num_threads(),
    'versions': {'jax': jax.__version__, 'transformers': transformers.__version__},
    'rounds': args.rounds,
    'goal': GOAL,
    'load_before': round(os.getloadavg()[0], 2),
  }
  result['results'] = [
    measure(shape, batch, args.prompt, args.new_tokens, args.rounds, args.seed)
    for shape in args.shapes
    for batch in args.batches
  ]
  result['load_after'] = round(os.getloadavg()[0], 2)
  result['met'] = all(row['ratio'] >= GOAL and row['same_tokens'] for row in result['results'])
  if args.json:
    print(json.dumps(result))
  else:
    for row in result.pop('results'):
      print('  '.join(f'{key} {value}' for key, value in row.items()))
    print(result)
  return int(not result['met'])


if __name__ == '__main__':
  raise SystemExit(main())
