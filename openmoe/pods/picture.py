"""A picture of planned steps: memory by kind against the limit, seconds by term."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

from matplotlib.figure import Figure

from openmoe.checkpoint.paths import write_whole
from openmoe.pods.request import Effort
from openmoe.pods.run import StepPlan

_INK, _LIMIT = '#2b2b33', '#b2182b'
_KINDS = {
  'parameters': '#2166ac',
  'optimizer': '#67a9cf',
  'gradients': '#d1e5f0',
  'activations': '#f4a582',
  'temporaries': '#d9d9d9',
}
_TERMS = {'compute': '#2166ac', 'kernels': '#67a9cf', 'waiting': '#d6604d', 'hidden': '#f4a582'}
_NAMES = {
  'compute': 'compute, by the compiler',
  'kernels': 'kernels, assumed',
  'waiting': 'links, waited for',
  'hidden': 'links, beside compute',
}


def draw(path: str | os.PathLike, plans: Sequence[StepPlan]) -> None:
  """Writes a PNG with one bar a plan; those of GPUs, of which neither is known, are left out."""
  plans = [p for p in plans if p.memory]
  figure = Figure(figsize=(12, 1.6 + 0.5 * len(plans)), layout='constrained')
  room, time = figure.subplots(1, 2, sharey=True)
  places = range(len(plans))
  left = [0.0] * len(plans)
  for kind, colour in _KINDS.items():
    sizes = [getattr(p.memory, kind) / 2**30 for p in plans]
    room.barh(places, sizes, left=left, color=colour, label=kind, height=0.6)
    left = [a + b for a, b in zip(left, sizes, strict=True)]
  for place, step in zip(places, plans, strict=True):
    limit = step.memory.limit / 2**30
    room.plot([limit, limit], [place - 0.4, place + 0.4], color=_LIMIT, linewidth=2)
    if not step.fits:
      time.text(0, place, ' does not fit', va='center', color=_LIMIT)
  room.set(xlabel='GiB a device; red: the limit', title='memory')
  left = [0.0] * len(plans)
  for term, colour in _TERMS.items():
    values = [_seconds(step, term) for step in plans]
    time.barh(places, values, left=left, color=colour, label=_NAMES[term], height=0.6)
    left = [a + b for a, b in zip(left, values, strict=True)]
  fast = any(step.request.effort is Effort.FAST for step in plans)
  time.set(
    xlabel='seconds, nothing overlapping', title=f'step{" (fast: too many)" if fast else ""}'
  )
  room.set_yticks(places, [label(step) for step in plans])
  room.invert_yaxis()
  for axes in (room, time):
    axes.legend(frameon=False, fontsize=8)
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=120, facecolor='white')
  write_whole(path, buffer.getvalue())


def _seconds(step: StepPlan, term: str) -> float:
  if step.time is None:
    return 0.0
  value = getattr(step.time, term)
  return sum(value) / 2 if isinstance(value, tuple) else value


def label(step: StepPlan) -> str:
  """A plan in a line."""
  mesh, request = step.request.mesh, step.request
  return (
    f'{request.model.name} {request.target}\nexpert {mesh.num_expert_partitions} model '
    f'{mesh.num_model_partitions}{" FSDP" if mesh.fsdp else ""}, {request.num_microbatches} '
    f'microbatches, {request.model.remat.value}'
  )
