"""Throughput of the server's engine: python -m scripts.benchmarks.serving [--shape small] [--json].

The same requests one after the other and all at once through one engine, `generate` of our model
with one row, and transformers' `generate` with all rows in one batch (its best case: equal lengths,
no padding), of the same random weights on the same device. Rounds are interleaved, figures are
medians over rounds after one of warm-up, ratios are medians of the rounds' ratios; CPU time stands
beside wall time. All must give the same tokens, up to near ties. Needs the `torch` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
from collections.abc import Callable
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax
import numpy as np

from openmoe.serving.engine import Engine
from openmoe.serving.request import Ask
from scripts.benchmarks.decode import NAMES, SHAPES, our_model, same, timed, torch_model

AT_ONCE_GOAL, TRANSFORMERS_GOAL = 3.0, 1.0


def ask_all(engine: Engine, prompts: list[list[int]], new: int) -> np.ndarray:
  """New tokens [prompts, new] of requests that are sent at once."""
  ended = [threading.Event() for _ in prompts]
  tell = lambda i: lambda event: event.finish is not None and ended[i].set()
  asks = [Ask(tuple(prompt), new) for prompt in prompts]
  works = engine.submit(asks, [tell(i) for i in range(len(asks))])
  for one in ended:
    one.wait()
  return np.array([work.new for work in works])


def measure(shape: str, requests: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
  """Figures of one shape."""
  import torch

  sizes = dict(zip(NAMES, SHAPES[shape], strict=True))
  theirs = torch_model(sizes, 0)
  ours = our_model(theirs, prompt + new)
  rows = np.random.default_rng(0).integers(1, sizes['vocab'], (requests, prompt))
  rows[:, 0] = ours.start_id
  prompts, tensor = rows[:, 1:].tolist(), torch.from_numpy(rows)
  engine = Engine(ours, requests, requests)
  engine.start()

  @torch.no_grad()
  def transformers() -> np.ndarray:
    out = theirs.generate(
      tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=new, do_sample=False
    )
    return out[:, prompt:].numpy()

  @torch.no_grad()
  def logits(row: int, after: np.ndarray) -> np.ndarray:
    return theirs(torch.from_numpy(np.r_[rows[row], after])[None]).logits[0, -1].numpy()

  one_by_one = lambda run: np.concatenate([run([one]) for one in prompts])
  ways: dict[str, Callable[[], np.ndarray]] = {
    'at_once': lambda: ask_all(engine, prompts, new),
    'one_after_the_other': lambda: one_by_one(lambda one: ask_all(engine, one, new)),
    'generate_one_row': lambda: one_by_one(
      lambda one: np.array([ours.generate(one, new)[0][0].tokens])
    ),
    'transformers': transformers,
  }
  tokens = {name: way() for name, way in ways.items()}
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
  for done in range(rounds):
    print(f'round {done + 1} of {rounds}', file=sys.stderr, flush=True)
    for name, way in ways.items():
      times[name].append(timed(way)[:2])
  engine.stop()
  ratio = lambda name, i=0: round(
    statistics.median(b[i] / a[i] for a, b in zip(times['at_once'], times[name], strict=True)), 2
  )
  others = [name for name in ways if name != 'at_once']
  agree = {
    name: all(
      same(found[i : i + 1], tokens['transformers'][i : i + 1], lambda after, i=i: logits(i, after))
      for i in range(requests)
    )
    for name, found in tokens.items()
  }
  return {
    'shape': shape,
    'requests': requests,
    'prompt': prompt,
    'new_tokens': new,
    'tokens_per_second': {
      name: round(requests * new / statistics.median(t[0] for t in times[name]), 1) for name in ways
    },
    'cpu_seconds': {name: round(statistics.median(t[1] for t in times[name]), 2) for name in ways},
    'at_once_over': {name: ratio(name) for name in others},
    'at_once_over_by_cpu_time': {name: ratio(name, 1) for name in others},
    'same_tokens': all(agree.values()),
  }


def main(argv: list[str] | None = None) -> int:
  import torch
  import transformers

  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', choices=SHAPES, default='small')
  parser.add_argument('--requests', type=int, default=16)
  parser.add_argument('--prompt', type=int, default=64, help='tokens of a prompt')
  parser.add_argument('--new_tokens', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--torch_threads', type=int, help='default: its own choice')
  args = parser.parse_args(argv)
  if args.torch_threads:
    torch.set_num_threads(args.torch_threads)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  load = round(os.getloadavg()[0], 2)
  found = measure(args.shape, args.requests, args.prompt, args.new_tokens, args.rounds)
  over = found['at_once_over']
  met = over['one_after_the_other'] >= AT_ONCE_GOAL and over['transformers'] >= TRANSFORMERS_GOAL
  found |= {'torch_threads': torch.get_num_threads()}
  found |= {'backend': jax.default_backend(), 'rounds': args.rounds, 'load_before': load}
  found |= {'load_after': round(os.getloadavg()[0], 2), 'met': met and found['same_tokens']}
  print(json.dumps(found))
  return int(not found['met'])


if __name__ == '__main__':
  raise SystemExit(main())
