"""Evaluation: shows the items of tasks to a model and writes down what comes back.

One straight line per task: items, prompts that fit, scores or texts, figures, one result file. What
a prompt says and how an answer counts is the task's business (tasks/), how the model computes is
openmoe/inference.py's.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from etils import epath

from openmoe.checkpoint.paths import checkpoint_name
from openmoe.config import ConfigError
from openmoe.evaluation import results
from openmoe.evaluation.items import EvaluationTask, Item, Prediction
from openmoe.evaluation.prompts import Encoder, PromptMode, check_finite
from openmoe.inference.decode import Sampling

# Texts whose tokens tell tokenizers apart that have no fingerprint of their own.
_PROBES = ('The quick brown fox.\n\n  x = 1', 'Ünïcödé 漢字 🙂', '<extra_id_0> </s> [INST]')
_SPARE_TOKENS = 8  # a generated answer may be so much longer than the longest that is expected
_NEEDED = ('seed', 'chunk', 'resamples')  # settings that may not be None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What is evaluated and how.

  Attributes:
    checkpoint: run directory, checkpoint_<step> folder or Hugging Face folder.
    out_dir: for result files; {checkpoint} in it becomes the name of what was read, see placed().
    tasks: names; tasks/evaluation/catalogue.py lists them.
    model: name of its sizes (gin/models), to be checked; None takes what the checkpoint says.
    vocabulary: SentencePiece model, for checkpoints that do not say theirs.
    dtype: of activations and of the layers' kernels.
    max_length: tokens of prompt and answer together; None is what the model was made for.
    shots: solved examples in a prompt; None is what each task is published with.
    prompt_mode: 'fixed' or 'reference'.
    max_items: evaluate only so many items of each task, the first ones; None for all.
    max_new_tokens: most tokens of a generated text; None is what each task asks for.
    chunk: items between two updates of the display.
    seed: of sampled texts and of the bootstrap.
    resamples: of the bootstrap.
    routing: what is done to the decisions of routers, such as 'ban=mlp.3:0,5'.
  """

  checkpoint: str
  out_dir: str
  tasks: tuple[str, ...]
  model: str | None = None
  vocabulary: str | None = None
  dtype: str = 'float32'
  max_length: int | None = None
  shots: int | None = None
  prompt_mode: str = 'fixed'
  max_items: int | None = None
  max_new_tokens: int | None = None
  chunk: int = 64
  seed: int = 0
  resamples: int = 1000
  routing: str = ''

  def __post_init__(self):
    modes = [mode.value for mode in PromptMode]
    if self.prompt_mode not in modes:
      raise ConfigError(f'prompt_mode={self.prompt_mode!r} must be one of {modes}.')
    names = self.tasks if isinstance(self.tasks, tuple | list) else ()
    if not names or not all(isinstance(name, str) for name in names):
      raise ConfigError(f"tasks={self.tasks!r} must be a tuple of names, such as ('triviaqa',).")
    least = {'shots': 0, 'seed': 0, 'max_length': 2}
    least |= dict.fromkeys(('max_items', 'max_new_tokens', 'chunk', 'resamples'), 1)
    for name, low in least.items():
      value = getattr(self, name)
      if value is None and name not in _NEEDED:
        continue
      if not isinstance(value, int) or isinstance(value, bool) or value < low:
        other = '' if name in _NEEDED else ', or None'
        rule = f'at least {low}' if low else '0 or more'
        raise ConfigError(f'{name}={value!r} must be a whole number, {rule}{other}.')


def placed(config: EvaluationConfig, step: int | None) -> EvaluationConfig:
  """The configuration with `checkpoint_STEP` where its out_dir has {checkpoint}.

  Results are named after the checkpoint that was read: of a run, the newest whole one, which no
  listing of its directory tells.

  Args:
    step: of the model; None for a folder without steps, whose place is `results`.
  """
  name = 'results' if step is None else checkpoint_name(step)
  return dataclasses.replace(config, out_dir=config.out_dir.replace('{checkpoint}', name))


class Model(Protocol):
  """What openmoe.inference.model.LanguageModel gives; tests use a fake."""

  name: str
  fingerprint: str
  vocabulary: Any
  max_length: int
  dropped_fraction: float

  def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Any]: ...

  def generate(
    self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
  ) -> list[list[Any]]: ...


class Display(Protocol):
  """Shown progress; openmoe/evaluation/display.py has one for terminals."""

  def begin(self, task: str, items: int) -> None: ...
  def advance(self, items: int) -> None: ...
  def end(self, result: Mapping[str, Any], resumed: bool) -> None: ...


def tokenizer_digest(vocabulary: Any) -> str:
  """Tells tokenizers apart by content."""
  if hasattr(vocabulary, 'fingerprint'):
    return vocabulary.fingerprint()
  content = [vocabulary.vocab_size, *(list(map(int, vocabulary.encode(p))) for p in _PROBES)]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _digest(ids: Sequence[Sequence[int]]) -> str:
  return hashlib.sha256(json.dumps([list(map(int, i)) for i in ids]).encode()).hexdigest()[:16]


def _score_items(model: Model, encoder: Encoder, task: EvaluationTask, items: Sequence[Item]):
  """Yields (record, prediction) of each item whose choices are ranked."""
  encoded = [encoder.choices(item) for item in items]
  requests = [
    (prompt.ids, continuation)
    for prompts, continuations in encoded
    for prompt, continuation in zip(prompts, continuations, strict=True)
  ]
  scores = iter(model.score(requests))
  for item, (prompts, continuations) in zip(items, encoded, strict=True):
    found = [next(scores) for _ in continuations]
    prediction = Prediction(
      log_probs=tuple(float(score.log_prob) for score in found),
      lengths=tuple(map(len, continuations)),
      greedy=tuple(bool(score.is_greedy) for score in found),
    )
    check_finite(prediction.log_probs, model.name, f'a choice of {task.name} item {item.name}')
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    record = {
      'name': item.name,
      'prompt': texts[0] if len(texts) == 1 else texts,
      'shots': prompts[0].shots,
      'cut': max(prompt.cut for prompt in prompts),
      'tokens': _digest([*(p.ids for p in prompts), *continuations]),
      'choices': list(item.choices),
      'prediction': item.choices[max(range(len(found)), key=prediction.log_probs.__getitem__)],
      'log_probs': list(prediction.log_probs),
      'token_log_probs': [[round(float(x), 6) for x in s.token_log_probs] for s in found],
    }
    yield record, prediction


def _new_tokens(task: EvaluationTask, config: EvaluationConfig, encoder, items) -> int:
  if config.max_new_tokens or task.max_new_tokens:
    return config.max_new_tokens or task.max_new_tokens
  lengths = (len(encoder.ids(answer)) for item in items for answer in item.answers)
  return max(lengths, default=0) + _SPARE_TOKENS


def _generate_items(model, encoder, task, config, items: Sequence[Item], new_tokens: int):
  """Yields (record, prediction) of each item that is answered with text."""
  prompts = [encoder.question(item, new_tokens) for item in items]
  sampling = Sampling(temperature=task.temperature)
  outputs = model.generate(
    [prompt.ids for prompt in prompts],
    new_tokens,
    stop=task.stop,
    sampling=sampling,
    samples=task.samples,
    seed=config.seed,  # the model keys draws by prompt and sample
  )
  for item, prompt, samples in zip(items, prompts, outputs, strict=True):
    sums = [float(sum(sample.log_probs)) for sample in samples]
    check_finite(sums, model.name, f'its text for {task.name} item {item.name}')
    record = {
      'name': item.name,
      'prompt': prompt.text,
      'shots': prompt.shots,
      'cut': prompt.cut,
      'tokens': _digest([prompt.ids]),
      'answers': list(item.answers),
      'texts': [sample.text for sample in samples],
      'finish': [sample.finish for sample in samples],
      'text_log_probs': [round(total, 5) for total in sums],
    }
    yield record, Prediction(texts=tuple(sample.text for sample in samples))


def settings(task: EvaluationTask, config: EvaluationConfig) -> dict[str, Any]:
  """Everything besides the model that a task's figures depend on."""
  return {
    'prompt_mode': config.prompt_mode,
    'shots': task.shots,
    'input_length': task.reference_length if config.prompt_mode == 'reference' else None,
    'max_items': config.max_items,
    'max_new_tokens': config.max_new_tokens or task.max_new_tokens,
    'samples': task.samples,
    'temperature': task.temperature,
    'append_eos': task.append_eos,
    'joint_tokenization': task.joint,
    'seed': config.seed,
  }


def identity(model: Model, task: EvaluationTask, config: EvaluationConfig) -> dict[str, Any]:
  """The head of a result file: what must agree for a finished task not to be done again."""
  return {
    'task': task.name,
    'group': task.group,
    'model': {'name': model.name, 'fingerprint': model.fingerprint},
    'tokenizer': tokenizer_digest(model.vocabulary),
    'bos': f'id {getattr(model, "start_id", 0)} before every prompt',
    'settings': settings(task, config) | {'max_length': model.max_length},
  }


def _finished(path: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
  """The result of an earlier run, None if there is none.

  Raises:
    ConfigError: there is one, of something else.
  """
  if not path.exists():
    return None
  found = results.load(path)
  model = {key: found['model'][key] for key in ('name', 'fingerprint')}
  for key, value in wanted.items():
    other = model if key == 'model' else found.get(key)
    if other != value:
      raise ConfigError(
        f'{path} holds a result with {key} {other}; now it is {value}. Choose another OUT_DIR, or '
        'delete that file.'
      )
  return found


def _measure(task: EvaluationTask, items: Sequence[Item], predictions: Sequence[Prediction]):
  """Figures of each item, side by side: for a program to be measured is to be run."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(task.measure, items, predictions))


def _answer(model, task, config, items: Sequence[Item], display):
  """(records, predictions) of all items, in their order."""
  encoder = Encoder(model.vocabulary, model.max_length, PromptMode(config.prompt_mode), task)
  new_tokens = 0 if items[0].choices else _new_tokens(task, config, encoder, items)
  records: list[dict[str, Any] | None] = [None] * len(items)
  predictions: list[Prediction | None] = [None] * len(items)
  # Alike lengths together, so that little of a batch is padding.
  order = sorted(range(len(items)), key=lambda i: len(items[i].prompt.text()))
  for begin in range(0, len(order), config.chunk):
    chosen = order[begin : begin + config.chunk]
    asked = [items[i] for i in chosen]
    if asked[0].choices:
      answered = list(_score_items(model, encoder, task, asked))
    else:
      answered = list(_generate_items(model, encoder, task, config, asked, new_tokens))
    measured = _measure(task, asked, [prediction for _, prediction in answered])
    for index, (record, prediction), measures in zip(chosen, answered, measured, strict=True):
      record['measures'] = {name: float(value) for name, value in measures.items()}
      records[index], predictions[index] = record, prediction
    display.advance(len(chosen))
  return records, predictions


def _items(task: EvaluationTask) -> list[Item]:
  """The items of a task.

  Raises:
    ConfigError: there are none, or two have the same name.
  """
  items = list(task.items())
  if not items:
    raise ConfigError(f'{task.name}: no item is left to ask; check its file, or leave it out.')
  names = collections.Counter(item.name for item in items)
  if twice := [name for name, count in names.items() if count > 1]:
    raise ConfigError(
      f'{task.name}: {len(twice)} items are there more than once, such as {twice[0]!r}; keep one '
      'of each.'
    )
  return items


def evaluate_task(
  model: Model, task: EvaluationTask, config: EvaluationConfig, display: Display
) -> dict[str, Any]:
  """Evaluates one task and writes its result file, or reads the one of an earlier run.

  Returns:
    The content of the result file.

  Raises:
    ConfigError: the file holds a result of another model or with other settings, the task has no
      items, or the model gives no numbers.
  """
  path = epath.Path(config.out_dir) / results.file_name(task.name)
  head = identity(model, task, config)
  found = _finished(path, head)
  if found is not None:
    display.end(found, resumed=True)
    return found
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is known now
  items = _items(task)[: config.max_items]
  display.begin(task.name, len(items))
  records, predictions = _answer(model, task, config, items, display)
  head |= _figures(task, config, items, predictions, records)
  head['model']['dropped_fraction'] = float(model.dropped_fraction)
  head['checkpoint'] = str(config.checkpoint)  # for people: it may have moved, its weights decide
  if jax.process_index() == 0:
    results.save(path, head, records)
  result = {**head, 'items': records}
  display.end(result, resumed=False)
  return result


def answer(
  model: Model, task: EvaluationTask, config: EvaluationConfig, display: Display
) -> dict[str, float]:
  """The figures of one task, without a result file.

  Raises:
    ConfigError: as evaluate_task.
  """
  items = _items(task)[: config.max_items]
  records, predictions = _answer(model, task, config, items, display)
  names = records[0]['measures']
  found = {n: sum(r['measures'][n] for r in records) / len(records) for n in names}
  if task.measure_all:
    whole = task.measure_all(items, predictions)
    found |= {name: float(value) for name, value in whole.items()}
  return found


def _figures(task, config, items, predictions, records) -> dict[str, Any]:
  """Metrics of the whole task with intervals, and how many prompts had to be cut."""
  metrics = {}
  for name in records[0]['measures']:
    values = [record['measures'][name] for record in records]
    low, high = results.interval(results.bootstrap(values, config.resamples, config.seed))
    metrics[name] = {'value': sum(values) / len(values), 'low95': low, 'high95': high}
  if task.measure_all:
    whole = task.measure_all(items, predictions)
    metrics |= {name: {'value': float(value)} for name, value in whole.items()}
  return {
    'metric': task.metric,
    'low': task.low,
    'high': task.high,
    'in_average': task.in_average,
    'shots': task.shots,
    'metrics': metrics,
    'count': len(items),
    'lost_shots': sum(record['shots'] < task.shots for record in records),
    'cut_prompts': sum(record['cut'] > 0 for record in records),
  }


def evaluate(
  model: Model, tasks: Sequence[EvaluationTask], config: EvaluationConfig, display: Display
) -> list[results.Row]:
  """Evaluates tasks one after the other; those that were finished before are read.

  Of several processes all do the same, and the first one writes; all have to see its files.

  Returns:
    The rows of the table, also written as summary.json and summary.csv.

  Raises:
    ConfigError: see evaluate_task.
  """
  found = [evaluate_task(model, task, config, display) for task in tasks]
  rows = results.summarise(found, config.resamples, config.seed)
  head = {
    'model': {'name': model.name, 'fingerprint': model.fingerprint},
    'tokenizer': tokenizer_digest(model.vocabulary),
    'prompt_mode': config.prompt_mode,
    'seed': config.seed,
  }
  if jax.process_index() == 0:
    results.save_summary(epath.Path(config.out_dir), rows, head)
  return rows
