"""BIG-bench-Lite as evaluation tasks, and as seqio tasks under BIG-bench's own names."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

from openmoe.evaluation.items import EvaluationTask, Item, Prediction
from tasks.bigbench import files, metrics, prompts
from tasks.evaluation import seqio_metrics

# The released evaluation cut prompts at so many tokens, from the right; long ones lose their end.
REFERENCE_LENGTH = 1024


def preferred_kind(leaf: files.Leaf) -> str:
  """'mul' or 'gen', whichever gives the metric that tables show."""
  return 'mul' if leaf.metric in files.MULTIPLE_CHOICE else 'gen'


def task_name(leaf: files.Leaf, kind: str, shots: int) -> str:
  """The name of the task in seqio's registry."""
  end = f'.{leaf.subtask}' if leaf.subtask else ''
  return f'bigbench:{leaf.task}.{kind}.t5_default_vocab.{shots}_shot.all_examples{end}'


def _measure(leaf: files.Leaf, kind: str, item: Item, prediction: Prediction) -> dict[str, float]:
  if kind == 'mul':
    return {'multiple_choice_grade': metrics.multiple_choice_grade(leaf, item, prediction)}
  return metrics.generative(leaf, item, prediction)


def _measure_all(
  leaf: files.Leaf, kind: str, items: Sequence[Item], predictions: Sequence[Prediction]
) -> dict[str, float]:
  if kind == 'mul':
    return metrics.calibration(items, predictions)
  return metrics.bleu(leaf, items, predictions)


def evaluation_tasks(
  directory: str | os.PathLike, name: str, shots: int, every_kind: bool = False
) -> list[EvaluationTask]:
  """One evaluation task per leaf.

  Their group is the task: its score is the mean over leaves, and its normalised score takes the
  means of low and high, which is what BIG-bench's aggregate comes to for all 24.

  Args:
    directory: holds the 24 folders.
    name: of the 24.
    shots: solved examples in each prompt.
    every_kind: also generate text where choices are what tables show (emoji_movie, strategyqa).

  Raises:
    ConfigError: as files.load_task.
  """
  found = []
  for leaf in files.load_task(directory, name):
    kinds = leaf.types if every_kind else (preferred_kind(leaf),)
    for kind in kinds:
      main = kind == preferred_kind(leaf)
      found.append(_task(leaf, kind, shots, main))
  return found


def _task(leaf: files.Leaf, kind: str, shots: int, main: bool) -> EvaluationTask:
  return EvaluationTask(
    name=task_name(leaf, kind, shots),
    # The second kind is a row of its own, with a range that says nothing of guessing.
    group=leaf.task if main else f'{leaf.task} (generated)',
    items=functools.partial(prompts.make_items, leaf, shots, kind),
    metric=leaf.metric if main else 'rougeLsum',
    measure=functools.partial(_measure, leaf, kind),
    measure_all=functools.partial(_measure_all, leaf, kind),
    low=leaf.low if main else 0.0,
    high=leaf.high if main else 100.0,
    shots=shots,
    in_average=main,
    reference_length=REFERENCE_LENGTH,
  )


def _rows(leaf: files.Leaf, kind: str, shots: int, seed: int) -> Mapping[str, list]:
  """The columns of a leaf's seqio examples: a row per choice, or per generated answer."""
  columns: dict[str, list] = {'inputs': [], 'targets': [], 'answers': [], 'idx': []}
  if kind == 'mul':
    columns |= {'scores': []}
  for row, item in enumerate(prompts.make_items(leaf, shots, kind, seed)):
    rows = item.choices if kind == 'mul' else item.answers[:1]
    columns['inputs'] += [item.prompt.text()] * len(rows)
    columns['targets'] += rows
    columns['answers'] += [item.answers] * len(rows)
    columns['idx'] += [[row, column] for column in range(len(rows))]
    if kind == 'mul':
      columns['scores'] += item.scores
  columns['answers'] = tf.ragged.constant(columns['answers'])
  return columns


def register(
  directory: str | os.PathLike, names: Sequence[str], shots: int, vocabulary: seqio.Vocabulary
) -> str:
  """Registers the seqio tasks of some BIG-bench tasks, and a mixture of all of them.

  Split `all`; features inputs and targets without EOS, as the released evaluation had them. A task
  that was registered before is replaced.

  Returns:
    Name of the mixture.
  """
  features = {
    'inputs': seqio.Feature(vocabulary, add_eos=False, required=False),
    'targets': seqio.Feature(vocabulary, add_eos=False),
  }
  registered = []
  for leaf in (leaf for name in names for leaf in files.load_task(directory, name)):
    for kind in leaf.types:
      name = task_name(leaf, kind, shots)

      def dataset(split, shuffle_files, seed=prompts.SHOT_SEED, leaf=leaf, kind=kind):
        del split, shuffle_files
        return tf.data.Dataset.from_tensor_slices(dict(_rows(leaf, kind, shots, seed)))

      if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
      seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=['all']),
        preprocessors=[seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder()],
        output_features=features,
        postprocess_fn=seqio_metrics.index_of,
        metric_fns=[
          seqio_metrics.metric(
            functools.partial(_task, leaf, kind, shots, True), kind == 'mul', vocabulary
          )
        ],
      )
      registered.append((name, len(leaf.examples)))
  mixture = f'bigbench:bigbench_lite_v1.mix.t5_default_vocab.{shots}_shot.all_examples'
  if mixture in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.remove(mixture)
  seqio.MixtureRegistry.add(mixture, registered)
  return mixture
