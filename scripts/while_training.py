"""What is done around a run that only the doors know how to: benchmarks of the catalogue."""

from __future__ import annotations

import dataclasses

from openmoe.config import ConfigError
from openmoe.data.shard import find_provider
from openmoe.evaluation import during
from openmoe.programme import as_programme
from scripts import gin_flags


def with_benchmarks(arguments: dict) -> dict:
  """Arguments of train() that evaluate EVAL_TASKS at every validation.

  Raises:
    ConfigError: a task is not known, its data are not there, there are several processes, or
      KEEP_BEST_BY is no figure of a validation.
  """
  asked = during.DuringTraining(**gin_flags.bindings('during.DuringTraining'))
  run = arguments['run']
  by_task = run.keep_best_by not in during.OF_LOSS
  if by_task and run.keep_best_by not in asked.tasks:
    raise ConfigError(
      f'KEEP_BEST_BY={run.keep_best_by!r} is neither {" nor ".join(during.OF_LOSS)}, nor one of '
      f'EVAL_TASKS={asked.tasks}: name a task there, or change it.'
    )
  if not asked.tasks:
    return arguments
  from tasks.evaluation import catalogue

  if not run.eval_period or arguments.get('eval_data') is None:
    raise ConfigError(f'EVAL_TASKS={asked.tasks} needs EVAL_PERIOD above 0; set it, or leave them.')
  options = {'bigbench_dir': asked.bigbench_dir, 'data_dir': asked.data_dir, 'shots': None}
  tasks = catalogue.make_tasks(asked.tasks, prompt_mode=asked.prompt_mode, **options)
  for source in arguments.get('sources', ()):
    source.register()
  data = as_programme(arguments['data'], run.total_steps).stages[-1].data
  vocabulary = find_provider(data.mixture_or_task_name).output_features['targets'].vocabulary
  if by_task:
    metric = next(task.metric for task in tasks if task.name == run.keep_best_by)
    run = dataclasses.replace(run, keep_best_by=f'{run.keep_best_by}/{metric}')
  more = during.benchmarks(asked, tasks, arguments['model'], vocabulary, data.row_length)
  return arguments | {'run': run, 'more_metrics': more}
