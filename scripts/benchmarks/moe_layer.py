"""Speed of the sparse layer: python -m scripts.benchmarks.moe_layer [--shape B] [--json].

Every dispatch, forward and forward + backward, beside two floors of the same expert FLOPs: one
dense MLP over all T k rows (`floor_one`) and one batched matmul of equal experts (`floor_bmm`).
Rounds are interleaved; a ratio is to the better floor of its own round. Medians are over rounds,
and CPU time and load are reported beside: a shared machine's milliseconds mean little.

Experts are plain SwiGLU, routed top-2 by a random router, float32. The layer includes router,
dispatch and combine. `executed_flops` counts the matrix products that a call executes, loops as
often as they run, over the model's own: 6 T k d f forward, three times that with the backward.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe.config import MoEConfig
from openmoe.layers.moe.layer import MoeLayer, scaled_init
from openmoe.models.jetmoe import SWIGLU
from scripts.benchmarks.flops import executed_flops

# tokens, embed, hidden, experts
SHAPES = {
  'tiny': (256, 32, 64, 4),
  'A': (2048, 256, 1024, 8),
  'B': (4096, 512, 1024, 16),
  'C': (8192, 256, 1024, 32),
}
TOP_K = 2
# name: (dispatch, routing group size or None for all tokens)
DESIGNS = {
  'dropless': ('dropless', None),
  'scatter': ('scatter', None),
  'scatter_512': ('scatter', 512),
  'mask_512': ('mask', 512),
}
# What each may take, as a multiple of the better floor.
GOALS = {'dropless': {'forward': 1.15, 'forward_backward': 1.45}}
FLOORS = ('floor_one', 'floor_bmm')


def _layer(design: str, tokens: int, d: int, f: int, e: int):
  """(function of (params, x), params) of one dispatch."""
  dispatch, group = DESIGNS[design]
  moe = MoEConfig(
    e,
    top_k=TOP_K,
    group_size=min(group or tokens, tokens),
    capacity_convention='with_top_k',
    router_order='top_k_softmax',
    dispatch=dispatch,
  )
  layer = MoeLayer(moe, f, jnp.float32, scaled_init(1.0), gating=SWIGLU)
  x_btd = jnp.zeros((1, tokens, d))
  params = nn.unbox(layer.init(jax.random.key(0), x_btd, None, False))['params']
  return lambda p, x: layer.apply({'params': p}, x[None], None, True)[0], params


def _floors(tokens: int, d: int, f: int, e: int):
  """{name: (function of (params, x), params, x)}; x are the T k rows."""
  rows = tokens * TOP_K
  normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape) * shape[-2] ** -0.5
  hidden = lambda gate: SWIGLU.activation(gate.reshape(*gate.shape[:-1], 2, f), None)
  one = lambda p, x: hidden(x @ p[0]) @ p[1]
  bmm = lambda p, x: jnp.einsum('erf,efd->erd', hidden(jnp.einsum('erd,edf->erf', x, p[0])), p[1])
  x = normal(3, rows, d)
  return {
    'floor_one': (one, (normal(1, d, 2 * f), normal(2, f, d)), x),
    'floor_bmm': (
      bmm,
      (normal(1, e, d, 2 * f), normal(2, e, f, d)),
      x.reshape(e, rows // e, d),
    ),
  }


def programs(shape: str, designs: list[str]) -> dict[str, dict[str, tuple[Callable, tuple]]]:
  """{kind: {name: (function, arguments)}}, not jitted."""
  tokens, d, f, e = SHAPES[shape]
  calls = _floors(tokens, d, f, e)
  x_td = jax.random.normal(jax.random.key(4), (tokens, d))
  for design in designs:
    calls[design] = (*_layer(design, tokens, d, f, e), x_td)
  forward = {name: (fn, (params, x)) for name, (fn, params, x) in calls.items()}

  def gradient(fn):
    return jax.value_and_grad(lambda p, x: jnp.sum(jnp.square(fn(p, x))), argnums=(0, 1))

  backward = {name: (gradient(fn), args) for name, (fn, args) in forward.items()}
  return {'forward': forward, 'forward_backward': backward}


def _timed(fn: Callable, args: tuple) -> tuple[float, float]:
  wall, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(fn(*args))
  return time.perf_counter() - wall, time.process_time() - cpu


def time_programs(calls: dict[str, tuple[Callable, tuple]], rounds: int) -> dict[str, dict]:
  """Medians per program; every round runs all of them once, in turn."""
  jitted = {name: (jax.jit(fn), args) for name, (fn, args) in calls.items()}
  for fn, args in jitted.values():
    _timed(fn, args)
  seen: dict[str, list[tuple[float, float]]] = {name: [] for name in jitted}
  for _ in range(rounds):
    for name, (fn, args) in jitted.items():
      seen[name].append(_timed(fn, args))
  best = [min(seen[n][i][0] for n in FLOORS) for i in range(rounds)]
  best_cpu = [min(seen[n][i][1] for n in FLOORS) for i in range(rounds)]
  return {
    name: {
      'ms': round(1e3 * statistics.median(w for w, _ in times), 2),
      'cpu_ms': round(1e3 * statistics.median(c for _, c in times), 2),
      'ratio': round(statistics.median(t[0] / b for t, b in zip(times, best, strict=True)), 3),
      'cpu_ratio': round(
        statistics.median(t[1] / b for t, b in zip(times, best_cpu, strict=True)), 3
      ),
    }
    for name, times in seen.items()
  }


def measure(shape: str, designs: list[str], rounds: int) -> dict:
  """All figures as one JSON-able dict."""
  tokens, d, f, e = SHAPES[shape]
  model_flops = 6 * tokens * TOP_K * d * f
  result = {
    'shape': {'id': shape, 'tokens': tokens, 'embed': d, 'mlp': f, 'experts': e, 'top_k': TOP_K},
    'backend': jax.default_backend(),
    'rounds': rounds,
    'load_before': round(os.getloadavg()[0], 2),
  }
  for kind, calls in programs(shape, designs).items():
    result[kind] = time_programs(calls, rounds)
    least = model_flops if kind == 'forward' else 3 * model_flops
    for name in designs:
      fn, args = calls[name]
      result[kind][name]['executed_flops'] = round(executed_flops(fn, *args) / least, 4)
  result['load_after'] = round(os.getloadavg()[0], 2)
  result['goals'] = {name: goal for name, goal in GOALS.items() if name in designs}
  return result


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', choices=SHAPES, default='B')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--designs', nargs='+', choices=DESIGNS, default=list(DESIGNS))
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  result = measure(args.shape, args.designs, args.rounds)
  if args.json:
    print(json.dumps(result))
    return 0
  print(f'{result["shape"]}, load {result["load_before"]} to {result["load_after"]}')
  for kind in ('forward', 'forward_backward'):
    for name, row in result[kind].items():
      figures = '  '.join(f'{key} {value}' for key, value in row.items())
      print(f'{kind:17} {name:12} {figures}')
  return 0


if __name__ == '__main__':
  raise SystemExit(main())
