"""Forms of the weights: python -m scripts.benchmarks.weights [--checkpoint X | --shape small].

One JSON line a form, against float32 in the same process: tokens a second of one row (decoding
alone, rounds interleaved, medians, CPU time beside), bytes of weights held and read for a token,
perplexity of texts that the float32 model drew itself, and how far greedy texts agree. Without a
checkpoint: a JetMoE of random weights in the sizes of scripts.benchmarks.decode.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import flax.linen as nn
import jax
import numpy as np

from convert import open as opening
from openmoe.config import ModelConfig, MoEConfig
from openmoe.inference.decode import Sampling
from openmoe.inference.int8 import bytes_a_token
from openmoe.inference.model import LanguageModel
from openmoe.models import build_model, empty_batch
from scripts.benchmarks.decode import NAMES, SHAPES, Ids

# Name -> (dtype, weights).
FORMS = {
  'float32': ('float32', 'float'),
  'bfloat16': ('bfloat16', 'float'),
  'int8': ('float32', 'int8'),
  'int8_layers': ('float32', 'int8_layers'),
}
SPEED_GOAL, BYTES_GOAL, PERPLEXITY_GOAL = 1.3, 0.3, 0.01
PROMPT, DRAWN = 32, 96  # tokens


def random_model(shape: str, dtype: str, weights: str) -> LanguageModel:
  """A JetMoE of random weights; the same in every form."""
  sizes = dict(zip(NAMES, SHAPES[shape], strict=True))
  config = ModelConfig(
    f'jetmoe_{shape}',
    architecture='jetmoe',
    vocab_size=sizes['vocab'],
    embed_dim=sizes['embed'],
    num_layers=sizes['layers'],
    num_sparse_layers=sizes['layers'],
    num_heads=sizes['heads'],
    head_dim=sizes['head_dim'],
    mlp_dim=sizes['mlp'],
    init_std=sizes['embed'] ** -0.5,
    dtype=dtype,
    moe=MoEConfig(
      sizes['experts'],
      dispatch='dropless',
      router_order='top_k_softmax',
      router_loss='sum',
      ignore_padding=True,
    ),
  )
  module = build_model(config)
  params = jax.jit(lambda: nn.unbox(module.init(jax.random.key(0), empty_batch(1, 8), train=False)))
  return LanguageModel(config, params()['params'], Ids(), max_length=512, weights=weights)


def perplexity(model: LanguageModel, texts: list[tuple[list[int], list[int]]]) -> float:
  """Of texts behind their prompts."""
  scores = model.score(texts)
  return math.exp(-sum(s.log_prob for s in scores) / sum(len(text) for _, text in texts))


def agreement(ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> float:
  """Share of tokens before the first that differs."""
  same = 0
  for a, b in zip(ours, theirs, strict=True):
    same += next(
      (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
  return same / max(sum(map(len, theirs)), 1)


def measure(models: dict[str, LanguageModel], rows: int, new: int, rounds: int) -> list[dict]:
  """Figures of every form; the first one is what others are compared with."""
  first = next(iter(models.values()))
  rng = np.random.default_rng(0)
  prompts = rng.integers(3, first.config.vocab_size, (rows, PROMPT)).tolist()
  drawn = first.generate(prompts, DRAWN, sampling=Sampling(1.0))
  texts = [(p, list(found[0].tokens)) for p, found in zip(prompts, drawn, strict=True)]
  greedy = lambda model: [model.generate([p], new)[0][0].tokens for p in prompts]
  found = {}
  for name, model in models.items():
    print(f'{name} ...', file=sys.stderr, flush=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    found[name] = {
      'form': name,
      'weights_bytes': size,
      'bytes_a_token': bytes_a_token(model.params, model.config),
      'perplexity': round(perplexity(model, texts), 5),
      'greedy': greedy(model),
    }
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
  for _ in range(rounds):
    for name, model in models.items():
      wall, cpu = time.perf_counter(), time.process_time()
      tokens = len(model.generate(prompts[:1], new)[0][0].tokens)
      spent = time.perf_counter() - wall, time.process_time() - cpu
      times[name].append(tuple(x / max(tokens, 1) for x in spent))
  base = next(iter(found.values()))
  rows_out = []
  for name, row in found.items():
    pairs = [*zip(times[next(iter(models))], times[name], strict=True)]
    row |= {
      'tokens_per_second': round(1 / statistics.median(t[0] for t in times[name]), 1),
      'faster': round(statistics.median(a[0] / b[0] for a, b in pairs), 2),
      'faster_by_cpu_time': round(statistics.median(a[1] / b[1] for a, b in pairs), 2),
      'bytes_ratio': round(row['bytes_a_token'] / base['bytes_a_token'], 4),
      'perplexity_change': round(row['perplexity'] / base['perplexity'] - 1, 6),
      'greedy_agreement': round(agreement(row['greedy'], base['greedy']), 4),
    }
    rows_out.append({key: value for key, value in row.items() if key != 'greedy'})
  return rows_out


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--checkpoint', help='what to load')
  parser.add_argument('--shape', choices=SHAPES, default='small', help='without a checkpoint')
  parser.add_argument('--forms', nargs='+', choices=FORMS, default=list(FORMS))
  parser.add_argument('--rows', type=int, default=4, help='texts')
  parser.add_argument('--new_tokens', type=int, default=64, help='of greedy texts')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args(argv)
  models: dict[str, Any] = {}
  for name in dict.fromkeys(['float32', *args.forms]):
    dtype, weights = FORMS[name]
    models[name] = (
      opening.load(args.checkpoint, dtype=dtype, weights=weights, max_length=512)
      if args.checkpoint
      else random_model(args.shape, dtype, weights)
    )
  rows = measure(models, args.rows, args.new_tokens, args.rounds)
  load = round(os.getloadavg()[0], 2)
  for row in rows:
    print(json.dumps(row | {'backend': jax.default_backend(), 'load': load}))
  int8 = next((row for row in rows if row['form'] == 'int8'), None)
  return int(
    int8 is not None
    and not (
      int8['faster'] >= SPEED_GOAL
      and int8['bytes_ratio'] <= BYTES_GOAL
      and abs(int8['perplexity_change']) <= PERPLEXITY_GOAL
    )
  )


if __name__ == '__main__':
  raise SystemExit(main())
