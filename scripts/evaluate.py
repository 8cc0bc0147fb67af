"""Evaluates a checkpoint: python -m scripts.evaluate --gin_file=gin/runs/eval.gin [--gin.X=Y ...]

  python -m scripts.evaluate --gin_file=gin/runs/eval.gin \\
    --gin.CHECKPOINT="'runs/openmoe_tiny'" --gin.TASKS="('known_unknowns',)" \\
    --gin.OUT_DIR="'runs/openmoe_tiny/eval'"

Writes one JSON file per task, summary.json and summary.csv into OUT_DIR, and prints the table. Run
again, it reads what is finished and does the rest. Exit codes: 0, and 64 when something cannot be
done as configured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scripts import quiet

quiet.import_tensorflow()

import jax
from absl import app, logging
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from convert import sizes
from convert.core.tensors import ConvertError
from openmoe.checkpoint.checkpointer import CheckpointError
from openmoe.config import ConfigError, ModelConfig
from openmoe.evaluation import results
from openmoe.evaluation import run as evaluate_lib
from scripts import gin_flags, processes
from tasks.evaluation import catalogue

EXIT_USAGE = 64
_WIDE = 110  # columns of a terminal that takes the whole table


class TerminalDisplay:
  """A bar for the task at hand, and one line for each that is done."""

  def __init__(self, console: Console, tasks: int):
    columns = (
      TextColumn('{task.description}'),
      BarColumn(),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
    )
    self._console, self._tasks, self._done = console, tasks, 0
    self._progress = Progress(*columns, console=console, transient=True)
    self._bar = None

  def __enter__(self) -> TerminalDisplay:
    self._progress.start()
    return self

  def __exit__(self, *exc) -> None:
    self._progress.stop()

  def begin(self, task: str, items: int) -> None:
    self._bar = self._progress.add_task(short_name(task), total=items)

  def advance(self, items: int) -> None:
    self._progress.advance(self._bar, items)

  def end(self, result: Mapping[str, Any], resumed: bool) -> None:
    if self._bar is not None:
      self._progress.remove_task(self._bar)
      self._bar = None
    self._done += 1
    figure = result['metrics'][result['metric']]
    notes = ['from an earlier run'] if resumed else []
    if result['lost_shots']:
      notes.append(f'{result["lost_shots"]} of {result["count"]} prompts lost shots')
    if result['cut_prompts']:
      notes.append(f'{result["cut_prompts"]} prompts were cut')
    line = (
      f'[{self._done}/{self._tasks}] {short_name(result["task"])}  {result["metric"]} '
      f'{figure["value"]:.4f}  {result["count"]} items'
    )
    self._console.print('  '.join([line, *notes]), markup=False, highlight=False, soft_wrap=True)


def short_name(task: str) -> str:
  """Without the parts that are alike in all names of BIG-bench's seqio tasks."""
  for part in ('bigbench:', '.t5_default_vocab', '.all_examples'):
    task = task.replace(part, '')
  return task


def table(rows: Sequence[results.Row], title: str, wide: bool) -> Table:
  """The summary as a person reads it; a wide one also names metrics and what was dropped."""
  found = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD)
  found.add_column('task', no_wrap=True)
  if wide:
    found.add_column('metric', no_wrap=True)
  names = ['score', 'normalised', '95 %', *(['items', 'shots', 'dropped'] if wide else ())]
  for name in names:
    found.add_column(name, justify='right', no_wrap=True)
  for row in rows:
    average = row.metric == 'normalised'
    if average:
      found.add_section()
    cells = [
      '' if average else f'{row.score:.4f}',
      f'{row.normalised:.2f}',
      '{:.1f} to {:.1f}'.format(*row.normalised95),
    ]
    more = [str(row.items), str(row.shots), f'{row.dropped:.1%}']
    found.add_row(row.group, *([row.metric] if wide else ()), *cells, *(more if wide else ()))
  return found


def load_model(config: evaluate_lib.EvaluationConfig) -> evaluate_lib.Model:
  """The model of a configuration, on all devices there are.

  Raises:
    ConfigError: there is no such checkpoint, or it has other sizes than config.model.
  """
  from scripts import load_model as loading

  model = loading.load(
    config.checkpoint,
    dtype=config.dtype,
    max_length=config.max_length,
    vocabulary=config.vocabulary,
  )
  if config.model:
    check_sizes(model.config, config.model, config.checkpoint)
  return model


def check_sizes(found: ModelConfig, name: str, checkpoint: str) -> None:
  """Raises ConfigError where a checkpoint is not of the model that was asked for."""
  wanted = sizes.named(name)
  for field in ('architecture', 'num_layers', 'num_sparse_layers', 'embed_dim', 'vocab_size'):
    has, asked = getattr(found, field), getattr(wanted, field)
    if has != asked:
      raise ConfigError(
        f'{checkpoint} has {field} {has}, MODEL={name} has {asked}; leave MODEL out, or name the '
        'checkpoint of that model.'
      )


def run(config: evaluate_lib.EvaluationConfig) -> list[results.Row]:
  """Tasks, model, evaluation, table."""
  tasks = catalogue.make_tasks(
    config.tasks,
    prompt_mode=config.prompt_mode,
    shots=config.shots,
    bigbench_dir=config.bigbench_dir,
    data_dir=config.data_dir,
    every_kind=config.every_kind,
    samples=config.samples,
    temperature=config.temperature,
  )
  model = load_model(config)
  console = Console(quiet=jax.process_index() != 0)
  console.print(
    f'{model.name} {model.fingerprint[:12]}: {len(tasks)} tasks into {config.out_dir}',
    highlight=False,
    soft_wrap=True,
  )
  with TerminalDisplay(console, len(tasks)) as display:
    rows = evaluate_lib.evaluate(model, tasks, config, display)
  title = f'{config.prompt_mode} prompts; normalised: 0 is guessing, 100 perfect'
  console.print(table(rows, title, wide=console.width >= _WIDE))
  return rows


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  try:
    processes.join()
    gin_flags.parse()
    bound = gin_flags.bindings('evaluate.EvaluationConfig')
    run(evaluate_lib.EvaluationConfig(**bound))
  except (ConfigError, CheckpointError, ConvertError) as error:
    print(f'error: {error}', file=sys.stderr)
    return EXIT_USAGE
  return 0


if __name__ == '__main__':
  app.run(main, argv=gin_flags.rewrite(sys.argv))
