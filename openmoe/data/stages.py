"""The stream over a programme of stages, and its plan.

StagedStream has ShardedStream's interface; its saved position says in which stage it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import seqio

from openmoe.checkpoint import safe_json
from openmoe.config import ConfigError, DataConfig
from openmoe.data import cache, shard
from openmoe.data.stream import ShardedStream, padding_batch
from openmoe.programme import Programme
from openmoe.types import Batch


class StagedStream:
  """ShardedStream over a programme; the last batch is the programme's last step."""

  def __init__(
    self, programme: Programme, shard_ids: Callable[[DataConfig], Sequence[int]], step: int = 0
  ):
    """Opens the stage of `step`; its data begin there.

    Args:
      programme: what to read.
      shard_ids: the logical shards of this host, by a stage's data config.
      step: global step of the first batch. Inside a stage, where restore() does not follow, the
        stage's data begin here: a run that starts from another run's checkpoint.
    """
    self._programme = programme
    self._shard_ids = shard_ids
    self._step = step
    self._stage: int | None = None  # whose stream is open
    self._stream: ShardedStream | None = None
    if step < programme.total_steps:
      self._open(programme.at(step)[0])

  def __enter__(self) -> StagedStream:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def __iter__(self) -> StagedStream:
    """Starts reading ahead; compile while it does."""
    if self._stream is not None:
      iter(self._stream)
    return self

  @property
  def data(self) -> DataConfig:
    """What the newest batch was read from; before the first, what the first will be."""
    return self._programme.stages[self._programme.at(max(self._step - 1, 0))[0]].data

  def _open(self, index: int) -> None:
    self.close()
    data = self._programme.stages[index].data
    self._stream = ShardedStream(data, self._shard_ids(data))
    self._stage = index

  def __next__(self) -> Batch:
    """The next batch; the first of a stage opens its mixture."""
    if self._step >= self._programme.total_steps:
      raise StopIteration
    index, _ = self._programme.at(self._step)
    if index != self._stage:
      self._open(index)
    batch = next(self._stream)
    self._step += 1
    return batch

  @property
  def ends(self) -> bool:
    """Whether the data of the next batch's stage are finite."""
    if self._step >= self._programme.total_steps:
      return True
    return self._programme.stages[self._programme.at(self._step)[0]].data.num_epochs is not None

  def pad(self) -> Batch:
    """Padding in place of the next batch: our shards ended, and another host's have not."""
    data = self._programme.stages[self._programme.at(self._step)[0]].data
    self._step += 1
    return padding_batch(data, len(self._shard_ids(data)))

  def state(self, seconds: float = 60.0) -> dict[str, bytes]:
    """One entry a shard: the stage's name, the step after the last batch, and the position.

    Just after the last batch of a stage the position is still that stage's, at its end.
    """
    if self._stream is None:
      raise RuntimeError('There is no position before the first batch.')
    header = json.dumps({'step': self._step, 'stages': self._signature(self._stage)}).encode()
    return {
      f'{self._programme.stages[self._stage].name}-{name}': header + b'\n' + position
      for name, position in self._stream.state(seconds).items()
    }

  def _signature(self, last: int) -> list[list[object]]:
    """The stages up to `last`: name, tokens, tokens a step."""
    return [[s.name, s.tokens, s.tokens_per_step] for s in self._programme.stages[: last + 1]]

  def _agrees(self, saved: Sequence[Sequence[object]], step: int) -> bool:
    """Whether a position of `saved` stages at global `step` is one of this programme.

    Finished stages must be what they were. The current one may have become longer; a run that is
    one stage may also change its batch size, as nothing switches inside it.
    """
    last = len(saved) - 1
    if last >= len(self._programme.stages) or saved[:-1] != self._signature(last)[:-1]:
      return False
    stage, (name, _, each) = self._programme.stages[last], saved[-1]
    if len(self._programme.stages) > 1 and each != stage.tokens_per_step:
      return False
    return stage.name == name and step <= self._programme.starts()[last] + stage.steps

  def restore(self, entries: Mapping[str, bytes]) -> None:
    """Continues where state() was taken, on any division of the hosts.

    Only before the first batch. At the end of a stage the next one begins at its beginning.

    Raises:
      ConfigError: the entries are of another programme; later stages may differ.
    """
    first = min(entries, default=None)
    if first is None:
      raise ConfigError('The saved data position is empty.')
    self._step, saved, _ = _parts(first, entries[first])
    last = len(saved) - 1
    if not self._agrees(saved, self._step):
      now = self._signature(len(self._programme.stages) - 1)
      raise ConfigError(
        f'The saved data position is after step {self._step} of the stages {saved} (name, tokens, '
        f'tokens a step), and the programme is {now}: finished stages must stay as they are, and '
        f'the current one must not end before that step.'
      )
    if self._step >= self._programme.total_steps:
      self.close()
      return
    index, _ = self._programme.at(self._step)
    if index != self._stage:
      self._open(index)
    if index == last:
      prefix = f'{self._programme.stages[last].name}-'
      self._stream.restore(
        {
          name.removeprefix(prefix): _parts(name, entries[name])[2]
          for name in entries
          if name.startswith(prefix)
        }
      )

  def ready(self, seconds: float) -> bool:
    """See ShardedStream.ready; True as well where the next batch opens a stage or ends the run."""
    if self._step >= self._programme.total_steps:
      return True
    if self._programme.at(self._step)[0] != self._stage:
      return True
    return self._stream.ready(seconds)

  def close(self) -> None:
    """Stops reading; may be called twice."""
    if self._stream is not None:
      self._stream.close()
      self._stream = self._stage = None


@dataclasses.dataclass(frozen=True)
class Saved:
  """What StagedStream.state() says by itself, to look at data without the run.

  Attributes:
    step: global step of the next batch.
    first: of the first batch of its stage.
    ends: whether the stage ends before the next batch, which is then of other data.
    data: of the stage.
    positions: for ShardedStream(data, all shards).restore().
  """

  stage: str
  step: int
  first: int
  ends: bool
  data: DataConfig
  positions: dict[str, bytes]


def saved(entries: Mapping[str, bytes]) -> Saved:
  """What a saved position says.

  Raises:
    ConfigError: there is none, or it is damaged.
  """
  if not entries:
    raise ConfigError('The saved data position is empty.')
  parts = {name: _parts(name, entries[name]) for name in sorted(entries)}
  step, stages, position = next(iter(parts.values()))
  name, _, each = stages[-1]
  lengths = [tokens // rate for _, tokens, rate in stages]
  data = shard.saved_config(position, each)
  positions = {k.removeprefix(f'{name}-'): v[2] for k, v in parts.items()}
  return Saved(name, step, sum(lengths[:-1]), step == sum(lengths), data, positions)


def _parts(name: str, entry: bytes) -> tuple[int, list[list], bytes]:
  """(step, [stage name, tokens, tokens a step] of every stage, position) of a saved entry.

  Raises:
    ConfigError: it is damaged.
  """
  head, _, position = entry.partition(b'\n')
  try:
    header = safe_json.loads(head.decode('utf-8'))
    step, stages = header['step'], header['stages']
    whole = isinstance(step, int) and isinstance(stages, list) and bool(stages)
    for stage, tokens, each in stages:
      whole = whole and isinstance(stage, str) and isinstance(tokens, int) and int(each) > 0
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'The saved data position {name!r} is damaged ({error!r}).') from error
  if not whole:
    raise ConfigError(f'The saved data position {name!r} is damaged: {head[:80]!r} is no header.')
  return step, stages, position


def plan_table(
  programme: Programme, source_tokens: Mapping[str, float] | None = None, more: int = 0
) -> list[dict[str, object]]:
  """Tokens and epochs by stage and source, to be read before a run starts.

  Args:
    programme: the stages.
    source_tokens: tokens of a task by name; else as its cache counted them, or as its source says.
    more: positions that a run of one stage saw with another batch size beyond what its steps say.

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
      tokens = (stage.tokens + (more if len(programme.stages) == 1 else 0)) * rate / total
      size = known.get(name) or _tokens_of_task(name, stage.data.split)
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


def _tokens_of_task(name: str, split: str) -> float | None:
  task = seqio.TaskRegistry.get(name)
  if task.supports_caching and task.cache_dir:
    return cache.counted_tokens(task, split)
  return getattr(task.source, 'tokens', None) if split == 'train' else None


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
