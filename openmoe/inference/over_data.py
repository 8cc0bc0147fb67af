"""Inference over data: predictions or scores of every example, as .jsonl, taken up where it ended.

A shard's examples are done in chunks, each written whole to a file of its own; when all are there
they become the shard's one file. Results do not depend on when a run was killed: the chunks are the
same, and inside a chunk the model's batches are. Names and fields are those of t5x's infer.py:
`<name>-<mode>.jsonl-00000-of-00004` of lines {"inputs": ..., "prediction": ...} or
{"inputs": ..., "score": ...}; `index` counts the examples of all shards.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import PARTIAL, write_whole
from openmoe.config import ConfigError
from openmoe.config.step import check_fields
from openmoe.inference.decode import Sampling
from openmoe.inference.model import LanguageModel

# (what is repeated in the output, ids of the inputs, ids of the targets)
Example = tuple[Mapping[str, Any], Sequence[int], Sequence[int]]


class Mode(enum.Enum):
  """What is written of an example."""

  PREDICT = 'predict'  # what follows the inputs
  SCORE = 'score'  # log-likelihood of the targets behind the inputs
  PREDICT_WITH_AUX = 'predict_with_aux'  # predictions with their log-likelihoods and ends


@dataclasses.dataclass(frozen=True)
class InferConfig:
  """How data are gone through.

  Attributes:
    name: of the data, for the files' names.
    out_dir: where the files go.
    mode: see Mode.
    shard_id, num_shards: this run does examples shard_id, shard_id + num_shards, ...
    chunk: examples between two saves.
    max_new_tokens, samples, seed: see LanguageModel.generate.
    stop: texts that end a prediction.
    sampling: how tokens are drawn.
  """

  name: str
  out_dir: str
  mode: Mode = Mode.PREDICT
  shard_id: int = 0
  num_shards: int = 1
  chunk: int = 64
  max_new_tokens: int = 64
  samples: int = 1
  seed: int = 0
  stop: tuple[str, ...] = ()
  sampling: Sampling = Sampling()

  def __post_init__(self):
    check_fields(self, zero=('shard_id', 'seed'))
    if self.shard_id >= self.num_shards:
      raise ConfigError(
        f'shard_id={self.shard_id} must be less than num_shards={self.num_shards}; shards count '
        'from 0.'
      )

  def file(self) -> epath.Path:
    """The shard's file."""
    name = f'{self.name}-{self.mode.value}.jsonl-{self.shard_id:05d}-of-{self.num_shards:05d}'
    return epath.Path(self.out_dir) / name

  def settings(self, model: LanguageModel) -> dict[str, Any]:
    """All that results depend on besides the examples; the same for every shard."""
    others = {'out_dir', 'shard_id', 'sampling', 'mode'}
    told = {k: v for k, v in dataclasses.asdict(self).items() if k not in others}
    told |= {'sampling': dataclasses.asdict(self.sampling), 'mode': self.mode.value}
    told |= {'model': model.fingerprint, 'max_length': model.max_length}
    return told | {'start_id': model.start_id, 'eos_ids': list(model.eos_ids)}


def infer(
  model: LanguageModel,
  examples: Iterable[Example],
  config: InferConfig,
  show: Callable[[int, int], None] = lambda done, new: None,
) -> epath.Path:
  """Goes through one shard of the examples, or what is left of it.

  Args:
    examples: of all shards, in the same order every time.
    show: called after each chunk with the examples done, and how many of them now.

  Returns:
    The shard's file.

  Raises:
    ConfigError: there are no examples, one does not fit the model, or what lies in out_dir is of
      another model, other settings or other examples.
  """
  target = config.file()
  _keep_settings(target.parent / f'{config.name}-{config.mode.value}.json', config.settings(model))
  if target.exists():
    return target
  place = target.parent / f'{target.name}{PARTIAL}'
  place.mkdir(parents=True, exist_ok=True)
  mine = itertools.islice(enumerate(examples), config.shard_id, None, config.num_shards)
  paths, done = [], 0
  while chunk := list(itertools.islice(mine, config.chunk)):
    path = place / f'chunk_{len(paths):05d}.jsonl'
    head = {'chunk': len(paths), 'examples': len(chunk), 'digest': _digest(chunk)}
    new = 0 if _is_done(path, head) else len(chunk)
    if new:
      lines = [head, *_answers(model, chunk, config)]
      write_whole(path, ''.join(f'{_json(line)}\n' for line in lines).encode())
    paths.append(path)
    done += len(chunk)
    show(done, new)
  if not paths:
    raise ConfigError(
      f'{config.name} has no examples for shard {config.shard_id} of {config.num_shards}; check '
      'the input, or give fewer shards.'
    )
  _join(paths, target)
  place.rmtree()
  return target


def _json(value: Any) -> str:
  """One line.

  Raises:
    ConfigError: a number is not finite.
  """
  try:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
  except ValueError as error:
    raise ConfigError(
      f'A score is no finite number ({error}): the weights or activations are not finite. `python '
      '-m convert fsck` names such weights; dtype float32 holds larger activations.'
    ) from error


def _digest(chunk: Sequence[tuple[int, Example]]) -> str:
  told = [[index, list(map(int, i)), list(map(int, t))] for index, (_, i, t) in chunk]
  return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _keep_settings(path: epath.Path, settings: Mapping[str, Any]) -> None:
  """Writes down what results depend on, or compares it with what an earlier run wrote."""
  settings = json.loads(json.dumps(settings))
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(settings, indent=1) + '\n').encode())
    return
  found = safe_json.read(path)
  for name in settings:
    if found.get(name) != settings[name]:
      raise ConfigError(
        f'{path} is of a run with {name} {found.get(name)!r}; now it is {settings[name]!r}. Choose '
        'another directory, or delete that one.'
      )


def _is_done(path: epath.Path, head: Mapping[str, Any]) -> bool:
  """Whether a chunk is there.

  Raises:
    ConfigError: it is of other examples.
  """
  if not path.exists():
    return False
  with path.open('rb') as file:
    found = safe_json.parse(file.readline(), str(path))
  if found != head:
    raise ConfigError(
      f'{path} holds results of other examples: the input has changed since. Choose another '
      'directory, or delete that one.'
    )
  return True


def _join(paths: Sequence[epath.Path], target: epath.Path) -> None:
  """The lines of all chunks as one file, whole or not at all."""
  unfinished = target.parent / f'{target.name}.joined{PARTIAL}'
  with unfinished.open('wb') as out:
    for path in paths:
      head, _, lines = path.read_bytes().partition(b'\n')
      del head
      out.write(lines)
  unfinished.replace(target)


def _answers(
  model: LanguageModel, chunk: Sequence[tuple[int, Example]], config: InferConfig
) -> Iterator[dict[str, Any]]:
  """The lines of a chunk."""
  for index, (_, inputs, targets) in chunk:
    after = len(targets) if config.mode is Mode.SCORE else 1
    needed = 1 + len(inputs) + after
    if needed > model.max_length:
      raise ConfigError(
        f'Example {index} of {config.name} needs {needed} tokens, more than max_length='
        f'{model.max_length}: cut its inputs (--inputs_length), or give a larger max_length.'
      )
  if config.mode is Mode.SCORE:
    found = model.score([(inputs, targets) for _, (_, inputs, targets) in chunk])
    for (index, (record, _, _)), score in zip(chunk, found, strict=True):
      yield {'index': index, 'inputs': record, 'score': score.log_prob}
    return
  generated = model.generate(
    [inputs for _, (_, inputs, _) in chunk],
    config.max_new_tokens,
    stop=config.stop,
    sampling=config.sampling,
    samples=config.samples,
    seed=config.seed,
  )
  one = lambda values: values[0] if config.samples == 1 else values
  for (index, (record, _, _)), samples in zip(chunk, generated, strict=True):
    line = {'index': index, 'inputs': record, 'prediction': one([s.text for s in samples])}
    if config.mode is Mode.PREDICT_WITH_AUX:
      scores = one([float(sum(s.log_probs)) for s in samples])
      line['aux'] = {'scores': scores, 'finish': one([s.finish for s in samples])}
    yield line
