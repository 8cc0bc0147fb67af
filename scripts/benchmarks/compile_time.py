"""Does the program grow with depth? python -m scripts.benchmarks.compile_time [--json]

Lowers and compiles the OpenMoE-8B train step (real widths, Adafactor, remat, nothing allocated)
with 12 and with 24 layers, every sixth sparse, in one process, and prints program sizes, seconds
and their ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import gin
import jax

from openmoe.config import ModelConfig, OptimizerConfig
from openmoe.models import build_model, empty_batch
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.train_step import abstract_state, train_step


def measure(config: ModelConfig) -> dict[str, float]:
  """Characters of StableHLO, instructions of the compiled program, seconds of each stage."""
  optimizer = OptimizerConfig()
  state, axes = abstract_state(config, optimizer)
  step = functools.partial(
    train_step,
    model=build_model(config),
    config=config,
    optimizer=make_optimizer(optimizer, axes, learning_rate(optimizer, 1)),
    schedule=learning_rate(optimizer, 1),
    num_microbatches=1,
    seed=0,
  )
  batch = jax.eval_shape(lambda: empty_batch(2, 2048))
  begin = time.monotonic()
  lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
  traced = time.monotonic()
  compiled = lowered.compile()
  return {
    'stablehlo_characters': len(lowered.as_text()),
    'compiled_instructions': compiled.as_text().count(' = '),
    'trace_seconds': traced - begin,
    'compile_seconds': time.monotonic() - traced,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='gin/models/openmoe_8b.gin')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  gin.parse_config_file(args.model)
  gin.parse_config('from __gin__ import dynamic_registration\nfrom openmoe import config\n')
  config = gin.get_configurable(ModelConfig)()
  period = config.sparse_period
  results = {}
  for layers in (12, 24, 12):  # the first only warms up
    sized = dataclasses.replace(config, num_layers=layers, num_sparse_layers=layers // period)
    results[layers] = measure(sized)
  ratios = {name: results[24][name] / results[12][name] for name in results[12]}
  report = {'model': config.name, '12': results[12], '24': results[24], '24_over_12': ratios}
  report['load'] = os.getloadavg()[0]
  if args.json:
    print(json.dumps(report))
    return
  for name in results[12]:
    low, high = results[12][name], results[24][name]
    print(f'{name:22} 12 layers {low:>12,.1f}   24 layers {high:>12,.1f}   x {ratios[name]:.2f}')
  print(f'load {report["load"]:.1f}')


if __name__ == '__main__':
  main()
