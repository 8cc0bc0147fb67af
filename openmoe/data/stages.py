"""A programme of stages over tokens: mixture, objective, lengths and schedule, one after the other.

`Programme.at(step)` is a pure function from the global step to the stage, so a stage ends at an
exact token count however often the run is killed. StagedStream is the stream over all of them, with
ShardedStream's interface; its saved position says in which stage it is.

Tokens are positions of the batches, padding included, as every published figure counts them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import seqio

from openmoe.config import ConfigError, DataConfig, OptimizerConfig
from openmoe.data import shard
from openmoe.data.stream import ShardedStream
from openmoe.types import Batch


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run.

  Attributes:
    name: for records and errors.
    tokens: positions it lasts; a multiple of batch_size * row_length.
    data: mixture, lengths, batch size and seed.
    optimizer: schedule of this stage; None keeps the run's.
  """

  name: str
  tokens: int
  data: DataConfig
  optimizer: OptimizerConfig | None = None

  def __post_init__(self):
    each = self.tokens_per_step
    if self.tokens <= 0 or self.tokens % each:
      raise ConfigError(
        f'Stage {self.name!r} lasts tokens={self.tokens}, which is not a positive multiple of '
        f'batch_size * row length = {each}, so no step ends there. Nearest: '
        f'{max(self.tokens // each, 1) * each} or {(self.tokens // each + 1) * each}.'
      )

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_size * self.data.row_length

  @property
  def steps(self) -> int:
    return self.tokens // self.tokens_per_step


@dataclasses.dataclass(frozen=True)
class Programme:
  """Stages in order."""

  stages: tuple[Stage, ...]

  def __post_init__(self):
    object.__setattr__(self, 'stages', tuple(self.stages))
    names = [stage.name for stage in self.stages]
    if not names or len(set(names)) != len(names):
      raise ConfigError(f'A programme needs stages with names of their own, not {names}.')

  @property
  def total_steps(self) -> int:
    return sum(stage.steps for stage in self.stages)

  def at(self, step: int) -> tuple[int, int]:
    """(stage, step inside it) of the batch that global step `step` (from 0) trains on.

    Raises:
      ValueError: step is not in 0 .. total_steps - 1.
    """
    inside = step
    for index, stage in enumerate(self.stages):
      if 0 <= inside < stage.steps:
        return index, inside
      inside -= stage.steps
    raise ValueError(f'step {step} is outside the programme of {self.total_steps} steps.')

  def tokens_before(self, step: int) -> int:
    """Positions trained on before global step `step`."""
    done = 0
    for stage in self.stages:
      steps = min(step, stage.steps)
      done += steps * stage.tokens_per_step
      step -= steps
    return done


class StagedStream:
  """ShardedStream over a programme; the last batch is the programme's last step."""

  def __init__(
    self, programme: Programme, shard_ids: Callable[[DataConfig], Sequence[int]], step: int = 0
  ):
    """Opens the stage of `step`, at its beginning.

    Args:
      programme: what to read.
      shard_ids: the logical shards of this host, by a stage's data config.
      step: a step at which a stage begins; elsewhere restore() is needed.
    """
    self._programme = programme
    self._shard_ids = shard_ids
    self._step = 0
    self._stream: ShardedStream | None = None
    if step:
      index, inside = programme.at(step)
      if inside:
        raise ConfigError(
          f'Step {step} lies {inside} steps inside stage {programme.stages[index].name!r}: '
          'restore a saved position, or begin where a stage begins.'
        )
      self._step = step

  def __enter__(self) -> StagedStream:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def __iter__(self) -> StagedStream:
    return self

  def _open(self, index: int) -> ShardedStream:
    data = self._programme.stages[index].data
    return ShardedStream(data, self._shard_ids(data))

  def __next__(self) -> Batch:
    """The next batch; the first of a stage opens its mixture."""
    if self._step >= self._programme.total_steps:
      raise StopIteration
    index, inside = self._programme.at(self._step)
    if not inside:
      self.close()
    if self._stream is None:
      self._stream = self._open(index)
    batch = next(self._stream)
    self._step += 1
    return batch

  def state(self) -> dict[str, bytes]:
    """One entry a shard: the stage's name, the step after the last batch, and the position.

    Just after the last batch of a stage the position is still that stage's, at its end.
    """
    if self._stream is None:
      raise RuntimeError('There is no position before the first batch.')
    index, _ = self._programme.at(self._step - 1)
    header = json.dumps({'step': self._step, 'stages': self._signature(index)}).encode()
    return {
      f'{self._programme.stages[index].name}-{name}': header + b'\n' + position
      for name, position in self._stream.state().items()
    }

  def _signature(self, last: int) -> list[list[object]]:
    """What must not change under a saved position: all stages up to its own, lengths included."""
    stages = self._programme.stages[: last + 1]
    return [[s.name, s.tokens, s.tokens_per_step] for s in stages]

  def restore(self, entries: Mapping[str, bytes]) -> None:
    """Continues where state() was taken, on any division of the hosts.

    Raises:
      ConfigError: the entries are of another programme; later stages may differ.
    """
    first = min(entries, default=None)
    if first is None:
      raise ConfigError('The saved data position is empty.')
    header = json.loads(entries[first].split(b'\n', 1)[0])
    step, saved = header['step'], header['stages']
    last = len(saved) - 1
    if last >= len(self._programme.stages) or saved != self._signature(last):
      now = self._signature(len(self._programme.stages) - 1)
      raise ConfigError(
        f'The saved data position is of the stages {saved} (name, tokens, tokens a step), and the '
        f'programme is {now}: finished and current stages must stay as they are.'
      )
    prefix = f'{self._programme.stages[last].name}-'
    own = {
      name.removeprefix(prefix): content.split(b'\n', 1)[1]
      for name, content in entries.items()
      if name.startswith(prefix)
    }
    self.close()
    self._stream = self._open(last)
    self._stream.restore(own)
    self._step = step

  def close(self) -> None:
    """Stops reading; may be called twice."""
    if self._stream is not None:
      self._stream.close()
      self._stream = None


def plan_table(
  programme: Programme, source_tokens: Mapping[str, int] | None = None
) -> list[dict[str, object]]:
  """Tokens and epochs by stage and source, to be read before a run starts.

  Args:
    programme: the stages.
    source_tokens: tokens of a task by name; cached tasks are looked up.

  Returns:
    Rows {'stage', 'source', 'share', 'tokens', 'epochs'}; epochs is None where the size of the
    source is not known.
  """
  known = dict(source_tokens or {})
  rows = []
  for stage in programme.stages:
    provider = shard.find_provider(stage.data.mixture_or_task_name)
    rates = shard.rates(provider)
    total = sum(rates.values())
    for name, rate in rates.items():
      tokens = stage.tokens * rate / total
      size = known.get(name) or _cached_tokens(name, stage.data.split)
      epochs = tokens / size if size else None
      rows.append(
        {
          'stage': stage.name,
          'source': name,
          'share': rate / total,
          'tokens': round(tokens),
          'epochs': epochs,
        }
      )
  return rows


def _cached_tokens(name: str, split: str) -> int | None:
  task = seqio.TaskRegistry.get(name)
  if not task.supports_caching or not task.cache_dir:
    return None
  return task.get_cached_stats(split).get('targets_tokens')


def format_plan(rows: Sequence[Mapping[str, object]]) -> str:
  """plan_table as text."""
  lines = [f'{"stage":<16} {"source":<40} {"share":>7} {"tokens":>20} {"epochs":>8}']
  for row in rows:
    epochs = 'unknown' if row['epochs'] is None else f'{row["epochs"]:.2f}'
    lines.append(
      f'{row["stage"]:<16} {row["source"]:<40} {row["share"]:>7.2%} {row["tokens"]:>20,} '
      f'{epochs:>8}'
    )
  return '\n'.join(lines)
