"""What `scripts.train --dry_run` prints: counts, shardings, bytes. Nothing is allocated."""

from __future__ import annotations

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmoe import plan as plan_lib
from openmoe.data.stages import format_plan, plan_table
from openmoe.observe.text import visible
from openmoe.programme import as_programme

GIB = 2**30


def show(arguments: dict, device_count: int | None) -> None:
  """Prints the plan of a run.

  Args:
    arguments: of openmoe.train.train.
    device_count: devices to plan for; None takes those that are here.

  Raises:
    ConfigError: the run cannot be split over so many devices.
  """
  count = device_count or jax.device_count()
  for source in arguments.get('sources') or ():
    source.register()
  model, mesh_config, optimizer = (arguments[name] for name in ('model', 'mesh', 'optimizer'))
  mesh = plan_lib.abstract_mesh(mesh_config, count)
  programme = as_programme(arguments['data'], arguments['run'].total_steps)
  run, eval_data = arguments['run'], arguments.get('eval_data')
  plan_lib.check(run, model, optimizer, programme, eval_data, mesh, mesh_config.fsdp)
  data = max(programme.stages, key=lambda stage: stage.tokens_per_step).data
  plan = plan_lib.make_plan(model, optimizer, mesh_config, mesh, data.batch_size, data.row_length)
  console = Console(width=None if Console().is_terminal else 140)
  sizes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  console.print(Text.assemble((visible(model.name), 'bold'), f' on {count} devices ({sizes})'))

  table = Table(box=None, header_style='bold')
  for name in ('parameter', 'shape', 'logical axes', 'mesh axes'):
    table.add_column(name, no_wrap=name == 'parameter', overflow='fold')
  table.add_column('MiB/device', justify='right')
  for row in plan.rows:
    shape, axes = 'x'.join(map(str, row.shape)), ' '.join(row.axes)
    table.add_row(Text(row.path), shape, axes, Text(row.spec), f'{row.device_bytes / 2**20:.2f}')
  console.print(table)

  rows = data.batch_size * data.row_length
  state = plan.params_bytes + plan.optimizer_bytes + plan.gradients_bytes
  lines = {
    'total parameters': f'{plan.total_params:,}',
    'active per token': f'{plan.active_params:,} (blocks; without embedding and output layer)',
    'global batch': f'{data.batch_size} x {data.row_length} = {rows:,} tokens',
    'model FLOPs per step': f'{plan.flops_per_step:.3e}',
    'parameters': f'{plan.params_bytes / GIB:.3f} GiB/device',
    'optimizer state': f'{plan.optimizer_bytes / GIB:.3f} GiB/device',
    'gradients': f'{plan.gradients_bytes / GIB:.3f} GiB/device',
    'sum': f'{state / GIB:.3f} GiB/device (activations and buffers come on top)',
  }
  if plan.capacity_note:
    lines['experts'] = plan.capacity_note
  for name, value in lines.items():
    console.print(f'  {name:22} {value}', highlight=False, markup=False)
  console.print()
  console.print(visible(format_plan(plan_table(programme))), highlight=False, markup=False)
