"""A plan as text for a terminal, and as plain values for --json."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from openmoe.checkpoint import fields
from openmoe.config import MeshConfig
from openmoe.observe.text import visible
from openmoe.pods.memory import state_of
from openmoe.pods.request import Effort
from openmoe.pods.run import HOST_DEVICES, StageTime, StepPlan, checkpoint_bytes, gib, remedies
from openmoe.pods.search import Found, bindings

_GPU_UNKNOWN = (
  'Of a GPU the program of XLA, its memory, transfers and seconds are not known here: no compiler '
  'for it is run. Exact are parameters, optimizer state and FLOPs.'
)


def as_values(step: StepPlan) -> dict[str, Any]:
  """Everything that is known of a step, as JSON has it."""
  request, one = step.request, step.compiled
  values: dict[str, Any] = {
    'digest': request.digest,
    'topology': str(request.target),
    'devices': request.target.device_count,
    'mesh': mesh_sizes(request.mesh, request.target.device_count),
    'fsdp': request.mesh.fsdp,
    'num_microbatches': request.num_microbatches,
    'tokens': request.tokens,
    'effort': request.effort.value,
    'fits': step.fits if one else None,
    'flops': dataclasses.asdict(step.flops),
    'checkpoint_bytes': checkpoint_bytes(request),
  }
  if one is None:
    return values
  values['memory'] = dataclasses.asdict(step.memory)
  values['seconds'] = {n: one.facts[n] for n in ('wall_seconds', 'cpu_seconds', 'peak_rss')}
  if not step.fits:
    return values | {'refusal': one.facts['overflow'], 'remedies': remedies(step)}
  values['collectives'] = [
    {n: v for n, v in fields.plain(c).items() if n != 'group'} for c in step.moved
  ]
  low, high = step.time.low, step.time.high
  values['time'] = dataclasses.asdict(step.time)
  values['utilisation'] = [step.utilisation(high), step.utilisation(low)]
  values['tokens_per_second'] = [request.tokens / high, request.tokens / low]
  return values


def mesh_sizes(mesh: MeshConfig, devices: int) -> dict[str, int]:
  expert, model = mesh.num_expert_partitions, mesh.num_model_partitions
  return {'data': devices // expert // model, 'expert': expert, 'model': model}


def show(
  steps: dict[str, StepPlan],
  times: list[StageTime],
  price: float | None,
  write_rate: float,
) -> None:
  """Prints a plan.

  Args:
    steps: by the names of the stages that have the same step.
    price: of a device and hour, or None.
    write_rate: bytes/s that a host writes.
  """
  console = Console(width=None if Console().is_terminal else 120, highlight=False)
  for names, step in steps.items():
    _show_step(console, names, step)
  if times:
    _show_stages(console, times, price)
  step = next(iter(steps.values()))
  size, hosts = (
    checkpoint_bytes(step.request),
    max(1, step.request.target.device_count // HOST_DEVICES),
  )
  console.print(
    f'checkpoint {size / 1e9:,.1f} GB; {hosts} hosts at {write_rate / 1e9:g} GB/s write it in '
    f'{size / hosts / write_rate:,.1f} s'
  )


def show_search(found: Found) -> None:
  """Prints what a search found, best first, with bindings to paste."""
  console = Console(width=None if Console().is_terminal else 140, highlight=False)
  console.print(
    f'{found.impossible} ways that the mesh cannot run, {found.pruned} that cannot fit, '
    f'{found.left} not compiled, {len(found.plans)} compiled'
  )
  table = _table('', 'GiB', 'of', 'GB sent', 'seconds', 'utilisation')
  for index, step in enumerate(found.plans):
    cells = ['-', '-', 'does not fit']
    if step.time:
      low, high = step.time.low, step.time.high
      cells[0] = f'{sum(c.wire_bytes for c in step.moved) / 1e9:,.1f}'
      cells[1] = f'{low:.2f} to {high:.2f}'
      cells[2] = f'{step.utilisation(high):.1%} to {step.utilisation(low):.1%}'
    table.add_row(str(index + 1), gib(step.memory.peak), gib(step.memory.limit), *cells)
  console.print(table)
  for index, step in enumerate(found.plans):
    console.print(f'{index + 1}: {bindings(step.request)}', markup=False, soft_wrap=True)


def _show_step(console: Console, names: str, step: StepPlan) -> None:
  request = step.request
  mesh = mesh_sizes(request.mesh, request.target.device_count)
  sizes = ' x '.join(f'{name} {size}' for name, size in mesh.items())
  console.print(
    f'[bold]{visible(request.model.name)}[/bold] on {request.target} '
    f'({request.target.device_count} devices: {sizes}{", FSDP" if request.mesh.fsdp else ""}), '
    f'stage {visible(names)}: '
    f'{request.batch_size} x {request.row_length} tokens in {request.num_microbatches} '
    f'microbatches, effort {request.effort.value}'
  )
  if step.memory:
    _show_memory(console, step)
  _show_flops(console, step)
  if not step.compiled:
    held = state_of(request)
    console.print(
      f'parameters {gib(held.params_bytes)} and optimizer {gib(held.optimizer_bytes)} GiB a device'
    )
    console.print(_GPU_UNKNOWN)
    return
  if step.time:
    _show_moved(console, step)
    _show_time(console, step)
  facts = step.compiled.facts
  console.print(
    f'[dim]compiled in {facts["wall_seconds"]:.0f} s ({facts["cpu_seconds"]:.0f} s of CPU, '
    f'{gib(facts["peak_rss"])} GiB)'
    f'{", kept from before" if step.compiled.cached else ""}[/dim]\n'
  )


def _table(*columns: str) -> Table:
  table = Table(box=None, header_style='bold', pad_edge=False)
  for index, name in enumerate(columns):
    table.add_column(name, justify='right' if index else 'left', overflow='fold')
  return table


def _show_memory(console: Console, step: StepPlan) -> None:
  room = step.memory
  verdict = '[green]fits[/green]' if step.fits else '[red]does not fit[/red]'
  console.print(f'{verdict}: {gib(room.peak)} of {gib(room.limit)} GiB a device')
  table = _table('memory', 'GiB')
  for name in ('parameters', 'optimizer', 'gradients', 'activations', 'temporaries'):
    table.add_row(name, gib(getattr(room, name)))
  console.print(table)
  for buffer in room.largest:
    console.print(f'  {gib(buffer.bytes):>6} GiB {buffer.shape:28} {visible(buffer.op_name)[-76:]}')
  if not step.fits:
    console.print(visible(step.compiled.facts['overflow']['message'].splitlines()[0]))
    for index, remedy in enumerate(remedies(step)):
      console.print(
        f'{"what would fit: " if not index else "           or: "}{remedy}', markup=False
      )


def _show_flops(console: Console, step: StepPlan) -> None:
  counted = step.flops
  table = _table('PFLOP a step', '', 'of model')
  for name in ('model', 'recomputed', 'dispatch', 'capacity', 'attention', 'other', 'executed'):
    value = getattr(counted, name)
    label = {'attention': 'attention above the diagonal'}.get(name, name)
    table.add_row(label, f'{value / 1e15:,.2f}', f'{value / counted.model:.1%}')
  console.print(table)


def _show_moved(console: Console, step: StepPlan) -> None:
  table = _table(
    'collective', 'over', 'calls', 'GB array', 'GB sent', 'leaves the', 'beside compute'
  )
  for one in step.moved[:12]:
    table.add_row(
      one.kind,
      f'{one.axes} ({one.group_size})',
      f'{one.count:,}',
      f'{one.array_bytes / 1e9:,.2f}',
      f'{one.wire_bytes / 1e9:,.2f}',
      {'host': '-', 'hosts': 'host', 'slices': 'slice'}[one.reach],
      'yes' if one.hidden else 'no',
    )
  console.print(table)


def _show_time(console: Console, step: StepPlan) -> None:
  time, request = step.time, step.request
  table = _table('seconds a step', '')
  note = ' (this effort: too many)' if request.effort is Effort.FAST else ''
  table.add_row(f'compute, by the compiler{note}', f'{time.compute:.3f}')
  for name, value in sorted(time.parts.items(), key=lambda item: -item[1]):
    table.add_row(f'  {name}', f'{value:.3f}')
  if time.kernels[1]:
    table.add_row('kernels without an estimate', f'{time.kernels[0]:.3f} to {time.kernels[1]:.3f}')
  table.add_row('memory, inside compute', f'{time.memory:.3f}')
  table.add_row('links, waited for', f'{time.waiting:.3f}')
  table.add_row('links, beside compute', f'{time.hidden:.3f}')
  table.add_row('step', f'{time.low:.3f} to {time.high:.3f}')
  console.print(table)
  console.print(
    f'predicted utilisation {step.utilisation(time.high):.1%} to {step.utilisation(time.low):.1%} '
    f'(nothing measured; docs/PODS.md has the error), '
    f'{request.tokens / time.high:,.0f} to {request.tokens / time.low:,.0f} tokens/s'
  )


def _show_stages(console: Console, times: list[StageTime], price: float | None) -> None:
  table = _table(
    'stage', 'steps', 'G tokens', 'days', 'device-hours', *(['price'] if price else [])
  )
  for one in times:
    cells = [f'{one.steps:,}', f'{one.tokens / 1e9:,.1f}']
    cells.append('{:.1f} to {:.1f}'.format(*one.days))
    cells.append('{:,.0f} to {:,.0f}'.format(*one.device_hours))
    if price:
      cells.append('{:,.0f} to {:,.0f}'.format(*(h * price for h in one.device_hours)))
    table.add_row(visible(one.name), *cells)
  console.print(table)
