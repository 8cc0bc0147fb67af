"""Plans a run for a pod that is not here.

  python -m scripts.plan --gin_file=gin/models/openmoe_8b.gin --gin_file=gin/runs/pretrain.gin \\
    --gin_file=gin/experiments/openmoe_8b.gin --topology=v5p:4x8x8

--search tries other meshes, microbatches and remat policies, and prints bindings to paste.

Compiles the run's own training step with the TPU compiler, on this machine's CPU, and prints
memory, FLOPs, what devices send one another, and the time of a step and of the whole run, as
ranges. docs/PODS.md says how good these are. It wants libtpu in a folder of its own:

  pip install --no-deps --target .libtpu libtpu==0.0.42.1

Exit codes: 0 it fits, 65 the compiler refuses it for want of memory, 64 it cannot be planned.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import json
import os
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'  # whatever is here, the plan is for something else

from scripts import quiet

quiet.import_tensorflow()

from absl import flags

from openmoe.pods import picture, report, run, search
from openmoe.pods.request import Effort
from openmoe.pods.target import Target
from openmoe.programme import Programme, as_programme
from scripts import configuration, gin_flags

_TOPOLOGY = flags.DEFINE_string('topology', None, 'As v5p:4x8x8, or H100:32x8.', required=True)
_SLICES = flags.DEFINE_integer('slices', 1, 'So many slices of that topology.', 1)
_EFFORT = flags.DEFINE_enum('effort', 'fast', ['fast', 'full'], 'Of the compiler.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')
_SEARCH = flags.DEFINE_bool('search', False, 'Try other meshes, microbatches and remat policies.')
_COMPILES = flags.DEFINE_integer('search_compiles', 6, 'So many ways are compiled at most.', 1)
_PICTURE = flags.DEFINE_string('picture', None, 'A PNG to write: memory and seconds of the plans.')
_PRICE = flags.DEFINE_float('price_per_device_hour', None, 'In any currency.', 0.0)
_RATE = flags.DEFINE_float('write_gb_per_second', 1.0, 'GB/s that a host writes.', 1e-3)


def main() -> int:
  # The run's directory is never looked at.
  flags.FLAGS.gin_bindings = ["MODEL_DIR='planned'", *flags.FLAGS.gin_bindings]
  arguments = configuration.configure()
  target = Target(_TOPOLOGY.value, _SLICES.value)
  wanted = run.requests(arguments, target, Effort(_EFFORT.value), checked=not _SEARCH.value)
  programme = as_programme(arguments['data'], arguments['run'].total_steps)
  if _SEARCH.value:
    return _search(arguments, wanted, programme)
  names: dict = {}
  for stage, request in zip(programme.stages, wanted, strict=True):
    names.setdefault(request, []).append(stage.name)
  steps = {request: run.plan_step(request) for request in names}
  times = run.stage_times(programme, [steps[request] for request in wanted])
  named = {' and '.join(names[request]): step for request, step in steps.items()}
  if _PICTURE.value:
    picture.draw(_PICTURE.value, list(steps.values()))
  if _JSON.value:
    values = {name: report.as_values(step) for name, step in named.items()}
    print(json.dumps({'steps': values, 'stages': [vars(one) for one in times]}))
  else:
    report.show(named, times, _PRICE.value, _RATE.value * 1e9)
  return 0 if all(step.fits for step in steps.values()) else command.DAMAGED


def _search(arguments: dict, wanted: list, programme: Programme) -> int:
  """Searches for the stage with the most tokens a step; all share mesh and microbatches."""
  request = max(wanted, key=lambda one: one.tokens)
  note = lambda line: print(line, file=sys.stderr, flush=True)
  check = search.checker(arguments, programme)
  found = search.search(request, check, _COMPILES.value, note)
  if _PICTURE.value:
    picture.draw(_PICTURE.value, found.plans)
  if _JSON.value:
    plans = [report.as_values(step) | {'bindings': search.bindings(step.request)}
             for step in found.plans]  # fmt: skip
    print(json.dumps(vars(found) | {'plans': plans}))
  else:
    report.show_search(found)
  return 0 if any(step.fits for step in found.plans) else command.DAMAGED


if __name__ == '__main__':
  gin_flags.run(main)
