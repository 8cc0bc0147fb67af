"""Memory and speed of conversions: a generated checkpoint through every direction.

  python -m scripts.benchmarks.convert_stream [--gigabytes 2] [--place DIR] [--json]

Each direction is a process of its own, as `python -m convert` runs it, and reports its peak memory
above what the interpreter had at the start and its rate as a share of a plain, synced file copy of
the same bytes in the same run. Logits are not compared here: that reads everything once more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
from etils import epath

from convert.__main__ import main as convert
from convert.core.names import name_table
from convert.core.source import model_shapes
from convert.core.tensors import Stored
from convert.formats.ours import OursSink
from openmoe.checkpoint.description import model_fields
from openmoe.config import ModelConfig, MoEConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
ONE = 'one_direction'
MEMORY_LIMIT, SHARE_LIMIT = 600_000_000, 0.3


def config_of(gigabytes: float) -> ModelConfig:
  """A model of about so many gigabytes in float32; the largest tensor has an eighth of them."""
  width = max(64, round(1024 * (gigabytes / 2) ** 0.5 / 64) * 64)
  return ModelConfig(
    name='generated',
    vocab_size=64 * width,
    num_layers=8,
    embed_dim=width,
    mlp_dim=2 * width,
    num_heads=width // 64,
    head_dim=64,
    num_sparse_layers=2,
    moe=MoEConfig(num_experts=16),
    dtype='float32',
  )


def generate(path: pathlib.Path, config: ModelConfig) -> int:
  """Writes a checkpoint of random weights in our form, piece by piece; returns its bytes."""
  shapes, dtype = model_shapes(config), np.dtype(np.float32)
  sources = {name: Stored(name, shape, dtype, None) for name, shape in shapes.items()}
  sink = OursSink(epath.Path(path), 7, {})
  sink.prepare(config, sources, dtype)
  generator = np.random.default_rng(0)
  for row in name_table(config):
    stored = sources[row.hf]
    step, target = stored.step(), sink.parameter(row)
    for start in range(0, stored.rows, step):
      count = min(step, stored.rows - start)
      x = generator.standard_normal((count, *stored.shape[1:]), np.float32)
      target.write(start, x * np.float32(0.02))
  sink.finish()
  return sum(stored.nbytes for stored in sources.values())


class PeakMemory:
  """Largest resident memory above what the process had at the start, sampled by a thread."""

  def __init__(self):
    self.base = self._resident()
    self.peak = self.base
    self._stop = threading.Event()
    threading.Thread(target=self._watch, daemon=True).start()

  @staticmethod
  def _resident() -> int:
    with open('/proc/self/statm', encoding='utf-8') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

  def _watch(self) -> None:
    while not self._stop.wait(0.01):
      self.peak = max(self.peak, self._resident())

  def above_base(self) -> int:
    """Bytes; ends the watching."""
    self._stop.set()
    return max(self.peak, self._resident()) - self.base


def copy_rate(source: str) -> float:
  """Bytes per second of a plain copy of a checkpoint's files, synced, on the disk of '.'."""
  place = tempfile.mkdtemp(prefix='.openmoe_copy_', dir='.')
  began, total = time.perf_counter(), 0
  try:
    for folder, _, files in os.walk(source):
      for name in files:
        path = os.path.join(place, f'{total}')
        total += os.path.getsize(os.path.join(folder, name))
        with open(os.path.join(folder, name), 'rb') as a, open(path, 'wb') as b:
          shutil.copyfileobj(a, b, 1 << 24)
          b.flush()
          os.fsync(b.fileno())
    return total / max(time.perf_counter() - began, 1e-9)
  finally:
    shutil.rmtree(place)


def one_direction(arguments: list[str]) -> int:
  """`python -m convert` with these arguments, SOURCE and TARGET last; prints its report."""
  out, memory = io.StringIO(), PeakMemory()
  with contextlib.redirect_stdout(out):
    code = convert([*arguments, '--json'])
  if code:
    return code
  report = json.loads(out.getvalue()) | {'peak_memory_above_base': memory.above_base()}
  report['share_of_file_copy'] = round(report['bytes_per_second'] / copy_rate(arguments[-2]), 3)
  print(json.dumps(report))
  return 0


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--gigabytes', type=float, default=2.0)
  parser.add_argument('--place', default=None, help='directory with four times the space')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  place = pathlib.Path(tempfile.mkdtemp(prefix='openmoe_convert_', dir=args.place))
  try:
    report = measure(place, config_of(args.gigabytes))
  finally:
    shutil.rmtree(place)
  if args.json:
    print(json.dumps(report))
  else:
    print(f'{"direction":16} {"bytes":>14} {"seconds":>8} {"peak MB":>8} {"of a copy":>10}')
    for name, line in report.items():
      print(
        f'{name:16} {line["bytes"]:14,} {line["seconds"]:8.1f} '
        f'{line["peak_memory_above_base"] / 1e6:8.0f} {line["share_of_file_copy"]:10.0%}'
      )
  return int(
    any(
      line['peak_memory_above_base'] > MEMORY_LIMIT or line['share_of_file_copy'] < SHARE_LIMIT
      for line in report.values()
    )
  )


def measure(place: pathlib.Path, config: ModelConfig) -> dict[str, dict]:
  """The report of every direction, by name."""
  generate(place / 'ours' / 'checkpoint_7', config)
  model = place / 'model.json'
  model.write_text(json.dumps(model_fields(config)), encoding='utf-8')
  directions = {
    'ours to hf': ('export', '--to', 'hf', 'ours', 'hf'),
    'hf to ours': ('import', '--from', 'hf', 'hf', 'from_hf'),
    'ours to t5x': ('export', '--to', 't5x', 'ours', 't5x'),
    't5x to ours': ('import', '--from', 't5x', 't5x', 'from_t5x'),
  }
  report = {}
  for name, (verb, flag, kind, source, target) in directions.items():
    module = 'scripts.benchmarks.convert_stream'
    command = [sys.executable, '-m', module, ONE, verb, flag, kind, '--model', str(model)]
    command += ['--no_logits', str(place / source), str(place / target)]
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
      command, capture_output=True, encoding='utf-8', cwd=place, env=environment
    )
    if done.returncode:
      raise RuntimeError(f'{name}: {done.stderr.strip()}')
    report[name] = json.loads(done.stdout)
    if target.startswith('from_'):
      shutil.rmtree(place / target)
  return report


if __name__ == '__main__':
  one = sys.argv[1:2] == [ONE]
  raise SystemExit(one_direction(sys.argv[2:]) if one else main())
