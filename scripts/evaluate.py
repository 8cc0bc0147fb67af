"""Evaluates a checkpoint: python -m scripts.evaluate --gin_file=gin/runs/eval.gin [--gin.X=Y ...]

  python -m scripts.evaluate --gin_file=gin/runs/eval.gin \\
    --gin.CHECKPOINT="'runs/openmoe_tiny'" --gin.TASKS="('known_unknowns',)" \\
    --gin.OUT_DIR="'runs/openmoe_tiny/eval'"

Writes one JSON file per task, summary.json and summary.csv into OUT_DIR, and prints the table. Run
again, it reads what is finished and does the rest. Exit codes: 0, and 64 when something cannot be
done as configured.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

from scripts import quiet

quiet.import_tensorflow()

import dataclasses

import jax
from rich.console import Console

from convert import sizes
from openmoe.config import ConfigError, ModelConfig
from openmoe.evaluation import display, results
from openmoe.evaluation import run as evaluate_lib
from openmoe.observe.text import visible
from openmoe.running.facts import code_facts, flat
from scripts import data_flags, gin_flags, processes
from tasks.evaluation import catalogue

_WIDE = 110  # columns of a terminal that takes the whole table


def load_model(config: evaluate_lib.EvaluationConfig) -> evaluate_lib.Model:
  """The model of a configuration, on all devices there are.

  Raises:
    ConfigError: there is no such checkpoint, or it has other sizes than config.model.
  """
  from convert import open as loading

  model = loading.load(
    config.checkpoint,
    dtype=config.dtype,
    max_length=config.max_length,
    vocabulary=config.vocabulary,
    model=config.model,
    routing=config.routing,
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


def run(config: evaluate_lib.EvaluationConfig, options: catalogue.TaskOptions) -> list[results.Row]:
  """Tasks, model, evaluation, table."""
  tasks = catalogue.make_tasks(
    config.tasks,
    prompt_mode=config.prompt_mode,
    shots=config.shots,
    **dataclasses.asdict(options),
  )
  model = load_model(config)
  config = evaluate_lib.placed(config, model.step)
  console = Console(quiet=jax.process_index() != 0)
  said = f'{model.name} {model.fingerprint[:12]}: {len(tasks)} tasks into {config.out_dir}'
  console.print(visible(said), highlight=False, markup=False, soft_wrap=True)
  with display.TerminalDisplay(console, len(tasks)) as shown:
    rows = evaluate_lib.evaluate(model, tasks, config, shown)
  title = f'{config.prompt_mode} prompts; normalised: 0 is guessing, 100 perfect'
  console.print(display.table(rows, title, wide=console.width >= _WIDE))
  return rows


@command.guarded
def main() -> None:
  gin_flags.parse()
  data_flags.use()
  config = evaluate_lib.EvaluationConfig(**gin_flags.bindings('evaluate.EvaluationConfig'))
  options = catalogue.TaskOptions(**gin_flags.bindings('catalogue.TaskOptions'))
  facts = lambda: flat('evaluation', config) | flat('tasks', options) | code_facts()
  with processes.joined(facts, config.out_dir):
    run(config, options)


if __name__ == '__main__':
  processes.run(main)
