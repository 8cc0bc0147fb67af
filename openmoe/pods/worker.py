"""The process that may load libtpu: reads a request, compiles the step, writes what came out.

  python -m openmoe.pods.worker FOLDER

FOLDER/request.json is read; FOLDER/program.txt.gz (the compiled program) and FOLDER/facts.json are
written. openmoe/pods/compiler.py starts it, with the environment that libtpu wants.
"""

from __future__ import annotations

import gzip
import itertools
import json
import pathlib
import re
import resource
import sys
import time

import jax

from openmoe import partitioning
from openmoe.checkpoint import fields, safe_json
from openmoe.checkpoint.paths import write_whole
from openmoe.config import ConfigError
from openmoe.pods.request import Effort, Request, trace

_SIZES = ('argument', 'output', 'alias', 'temp', 'generated_code')


def main(folder: pathlib.Path) -> None:
  request = fields.read(Request, safe_json.read(folder / 'request.json'), 'request.json')
  if request.effort is Effort.FAST:
    jax.config.update('jax_optimization_level', 'O1')
  facts = compile_step(request, folder)
  write_whole(folder / 'facts.json', json.dumps(facts).encode())


def compile_step(request: Request, folder: pathlib.Path) -> dict:
  """Compiles; the program's text goes to the folder, everything else into the result."""
  clock = [time.monotonic()]
  lap = lambda: clock.append(time.monotonic())
  devices = request.target.devices()
  mesh = partitioning.make_mesh(request.mesh, devices)
  traced = trace(request, mesh)
  lap()
  lowered = traced.lower()
  lap()
  facts: dict = {'overflow': None, 'jax': jax.__version__}
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    facts['overflow'] = _overflow(str(error))
  else:
    memory = compiled.memory_analysis()
    facts['memory'] = {n: int(getattr(memory, f'{n}_size_in_bytes')) for n in _SIZES}
    facts['memory']['peak'] = int(memory.peak_memory_in_bytes)
    write_whole(folder / 'program.txt.gz', gzip.compress(compiled.as_text().encode(), 6))
  lap()
  flat = mesh.devices.reshape(-1)
  facts['mesh'] = [[name, size] for name, size in mesh.shape.items()]
  facts['hosts'] = [[getattr(d, 'slice_index', None) or 0, d.process_index] for d in flat]
  facts['coords'] = [[*d.coords, d.core_on_chip] for d in flat]
  facts['kind'] = devices[0].device_kind
  seconds = [b - a for a, b in itertools.pairwise(clock)]
  facts['seconds'] = dict(zip(('trace', 'lower', 'compile'), seconds, strict=True))
  facts['cpu_seconds'] = time.process_time()
  facts['peak_rss'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return facts


def _overflow(message: str) -> dict:
  """What a refusal says: bytes that are wanted and those there are.

  Raises:
    ConfigError: it is no refusal for want of memory.
  """
  if 'RESOURCE_EXHAUSTED' not in message:
    raise ConfigError(f'The compiler refuses this step: {message.splitlines()[0]}')
  units = ' KMGT'
  found = re.findall(r'(\d+\.\d+)([KMGT])', message)
  sizes = [float(number) * 1024 ** units.index(unit) for number, unit in found]
  wanted, limit = (*sizes, None, None)[:2]
  return {'wanted': wanted, 'limit': limit, 'message': message[:4000]}


if __name__ == '__main__':
  try:
    main(pathlib.Path(sys.argv[1]))
  except ConfigError as error:
    print(error, file=sys.stderr)
    raise SystemExit(64) from None
