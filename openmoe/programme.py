"""A programme of stages over tokens: mixture, objective, lengths and schedule, one after the other.

`Programme.at(step)` is a pure function from the global step to the stage, so a stage ends at an
exact token count however often the run is killed. A run with one data configuration is a programme
of one stage.

Tokens are positions of the batches, padding included, as every published figure counts them.
"""

from __future__ import annotations

import dataclasses

from openmoe.config import ConfigError, DataConfig, OptimizerConfig

# What a stage may change of the run's optimizer: the state of all else carries over unchanged.
SCHEDULE_FIELDS = ('schedule', 'learning_rate', 'warmup_steps', 'decay_steps', 'final_fraction')


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run.

  Attributes:
    name: for records and errors.
    tokens: positions it lasts; a multiple of batch_size * row_length.
    data: mixture, lengths, batch size and seed.
    optimizer: schedule of this stage, counted from its first step; None goes on with the run's.
      Apart from its schedule it must be the run's.
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

  def lengths(self) -> list[tuple[str, int]]:
    """Name and steps of every stage."""
    return [(stage.name, stage.steps) for stage in self.stages]

  def starts(self) -> list[int]:
    """Global step (from 0) at which each stage begins."""
    return [sum(s.steps for s in self.stages[:index]) for index in range(len(self.stages))]

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


def as_programme(data: DataConfig | Programme, total_steps: int) -> Programme:
  """What a run of total_steps trains on.

  Raises:
    ConfigError: the programme ends before the run does.
  """
  if isinstance(data, Programme):
    if total_steps > data.total_steps:
      sums = ' + '.join(f'{stage.steps} ({stage.name})' for stage in data.stages)
      raise ConfigError(
        f'total_steps={total_steps} is more than the programme of stages lasts, {sums} = '
        f'{data.total_steps} steps: lower TRAIN_STEPS, or give the last stage more tokens.'
      )
    return data
  return Programme((Stage('run', total_steps * data.batch_size * data.row_length, data),))


def check_optimizers(programme: Programme, optimizer: OptimizerConfig) -> None:
  """Raises ConfigError where a stage changes more of the run's optimizer than its schedule."""
  for stage in programme.stages:
    if stage.optimizer is None:
      continue
    for field in dataclasses.fields(optimizer):
      mine, runs = getattr(stage.optimizer, field.name), getattr(optimizer, field.name)
      if field.name not in SCHEDULE_FIELDS and mine != runs:
        raise ConfigError(
          f'Stage {stage.name!r} has optimizer {field.name}={mine!r} and the run {runs!r}: a stage '
          f'may change {", ".join(SCHEDULE_FIELDS)} only, as the optimizer state goes on.'
        )
