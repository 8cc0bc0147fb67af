"""Names of evaluations, and the tasks behind them.

`bigbench_lite` is all 24 tasks; each of their names is one; the rest are the benchmarks of
OpenMoE's and JetMoE's tables. `openmoe` and `jetmoe` stand for those tables.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from openmoe.config import ConfigError
from openmoe.evaluation.items import EvaluationTask, Item
from tasks.bigbench import files, lite
from tasks.evaluation import answers, code, leaderboard, seqio_metrics

BENCHMARKS: dict[str, Callable[..., EvaluationTask]] = {
  'triviaqa': answers.triviaqa,
  'mmlu': leaderboard.mmlu,
  'arc_challenge': leaderboard.arc_challenge,
  'boolq': answers.boolq,
  'lambada': answers.lambada,
  'humaneval': code.humaneval,
  'gsm8k': answers.gsm8k,
  'mbpp': code.mbpp,
  'hellaswag': leaderboard.hellaswag,
  'winogrande': leaderboard.winogrande,
  'truthfulqa': leaderboard.truthfulqa,
  'piqa': leaderboard.piqa,
}
SUITES = {
  'bigbench_lite': files.TASKS,
  'openmoe': ('triviaqa', 'mmlu', 'arc_challenge', 'boolq', 'lambada', 'humaneval'),
  'jetmoe': (
    'arc_challenge',
    'hellaswag',
    'mmlu',
    'truthfulqa',
    'winogrande',
    'gsm8k',
    'mbpp',
    'humaneval',
  ),
}
_PROGRAMS = ('humaneval', 'mbpp')
_GENERATED = ('triviaqa', 'gsm8k', *_PROGRAMS)  # the others rank choices
BIGBENCH_SHOTS = 3  # of the published table


def _nearest(name: object, known: Sequence[str]) -> str:
  """The names that are most like one, or all of them."""
  return ', '.join(difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known)


@dataclasses.dataclass(frozen=True)
class TaskOptions:
  """Where tasks read, and how often programs are sampled; the rest of make_tasks.

  Attributes:
    bigbench_dir: where scripts.fetch_bigbench_lite put the task files.
    data_dir: holds the files of the other benchmarks, one folder each.
    every_kind: also generate text for BIG-bench tasks whose tables show ranked choices.
    samples: texts per program (HumanEval, MBPP); pass@k needs at least k.
    temperature: of those samples.
  """

  bigbench_dir: str = files.DEFAULT_DIR
  data_dir: str = 'runs/evaluation_data'
  every_kind: bool = False
  samples: int = 1
  temperature: float = 0.0

  def __post_init__(self):
    if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
      raise ConfigError(f'samples={self.samples!r} must be a whole number, at least 1.')
    heat = self.temperature
    if not isinstance(heat, int | float) or isinstance(heat, bool) or not 0 <= heat < math.inf:
      raise ConfigError(f'temperature={heat!r} must be a number of 0 or more.')


def expand(names: Sequence[str]) -> list[str]:
  """Names with suites replaced by what they stand for, each once.

  Raises:
    ConfigError: a name is not known; with the nearest.
  """
  known = [*SUITES, *BENCHMARKS, *files.TASKS]
  found = []
  for name in names:
    if name not in known:
      raise ConfigError(f'{name!r} is no evaluation. Nearest: {_nearest(name, known)}.')
    found += SUITES.get(name, (name,))
  return list(dict.fromkeys(found))


def make_tasks(
  names: Sequence[str],
  *,
  prompt_mode: str,
  shots: int | None,
  bigbench_dir: str,
  data_dir: str,
  every_kind: bool = False,
  samples: int = 1,
  temperature: float = 0.0,
) -> list[EvaluationTask]:
  """The evaluation tasks of some names.

  Args:
    names: of the catalogue.
    prompt_mode: 'reference' or 'fixed'. BIG-bench's prompts are the original's in both; what is
      different there is how a prompt that is too long is cut (openmoe/evaluation/run.py).
    shots: solved examples; None is what each is published with.
    bigbench_dir: holds the 24 folders.
    data_dir: holds a folder for each other benchmark.
    every_kind: see bigbench.lite.evaluation_tasks.
    samples: programs per item (humaneval, mbpp).
    temperature: of these.

  Raises:
    ConfigError: a name is not known, or data is not there.
  """
  found = []
  for name in expand(names):
    if name in files.TASKS:
      count = BIGBENCH_SHOTS if shots is None else shots
      found += lite.evaluation_tasks(bigbench_dir, name, count, every_kind)
    elif name in _PROGRAMS:
      found.append(BENCHMARKS[name](prompt_mode, shots, data_dir, samples, temperature))
    else:
      found.append(BENCHMARKS[name](prompt_mode, shots, data_dir))
  return found


def register(name: str, mode: str, data_dir: str, vocabulary: seqio.Vocabulary | str) -> str:
  """Registers a benchmark as the seqio task `<name>_<mode>`, with its figures as metrics.

  A row per choice (idx is [item, choice], is_correct its credit), or per item with its first
  answer; nothing is read before a dataset is asked for.

  Args:
    name: of the benchmark.
    mode: 'reference' or 'fixed'.
    data_dir: holds its files.
    vocabulary: of the model; or a registered task or mixture that has it.

  Returns:
    Name of the task.
  """
  if name not in BENCHMARKS:
    raise ConfigError(f'{name!r} is no benchmark. Nearest: {_nearest(name, list(BENCHMARKS))}.')

  if isinstance(vocabulary, str):
    vocabulary = seqio.get_mixture_or_task(vocabulary).output_features['targets'].vocabulary
  make = functools.partial(BENCHMARKS[name], mode, None, data_dir)

  def dataset(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    items = make().items()
    rows = [row for i, item in enumerate(items) for row in _seqio_rows(i, item)]
    return tf.data.Dataset.from_tensor_slices({key: [r[key] for r in rows] for key in rows[0]})

  task = f'{name}_{mode}'
  if task in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(task)
  seqio.TaskRegistry.add(
    task,
    source=seqio.FunctionDataSource(dataset, splits=['test']),
    preprocessors=[seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder()],
    output_features={
      'inputs': seqio.Feature(vocabulary, add_eos=False, required=False),
      'targets': seqio.Feature(vocabulary, add_eos=False),
    },
    postprocess_fn=seqio_metrics.index_of,
    metric_fns=[seqio_metrics.metric(make, name not in _GENERATED, vocabulary)],
  )
  return task


def _seqio_rows(index: int, item: Item) -> list[dict]:
  if not item.choices:
    target = item.answers[0] if item.answers else ''
    return [{'idx': [index, 0], 'inputs': item.prompt.text(), 'targets': target, 'is_correct': 1.0}]
  prompts = item.prompts or (item.prompt,) * len(item.choices)
  return [
    {'idx': [index, k], 'inputs': prompt.text(), 'targets': choice, 'is_correct': score}
    for k, (prompt, choice, score) in enumerate(
      zip(prompts, item.choices, item.scores, strict=True)
    )
  ]
