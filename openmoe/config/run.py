"""What lies around a training step: the data, and the run."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from openmoe.config.step import check_fields, require


class InitialState(enum.Enum):
  """What a run takes over from TrainConfig.initial_checkpoint."""

  ALL = 'all'  # parameters, optimizer and step: the next phase of a run, with other data
  PARAMS = 'params'  # parameters only: fine-tuning, upcycled checkpoints


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where batches come from. The batch at a step is a function of this and the step alone.

  Attributes:
    mixture_or_task_name: a registered seqio task or mixture.
    task_feature_lengths: {'inputs': n, 'targets': m} (prefix form, rows of n + m) or
      {'targets': m}.
    batch_size: rows of the global batch.
    split: seqio split.
    seed: of shuffling, mixing and denoising.
    num_shards: logical shards the stream is divided into, each its own pipeline; batch_size must
      be a multiple, and the number of hosts must divide it. Changing it changes the data order.
    shuffle: off for evaluation.
    pack: several examples to a row.
    use_cached: read what scripts.cache_tasks wrote.
    num_epochs: None repeats forever.
    exclude: file that lists documents to leave out, see openmoe/data/exclusion.py.
  """

  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  batch_size: int
  split: str = 'train'
  seed: int = 0
  num_shards: int = 8
  shuffle: bool = True
  pack: bool = True
  use_cached: bool = False
  num_epochs: int | None = None
  exclude: str | None = None

  def __post_init__(self):
    check_fields(self, zero=('seed',))
    lengths = dict(self.task_feature_lengths)
    require(
      'targets' in lengths and set(lengths) <= {'inputs', 'targets'},
      f'task_feature_lengths={lengths} needs targets and, for prefix objectives, inputs.',
    )
    require(
      all(type(n) is int and n > 0 for n in lengths.values()),
      f'task_feature_lengths={lengths} must be whole numbers of at least 1.',
    )
    require(
      self.batch_size % self.num_shards == 0,
      f'batch_size={self.batch_size} is not a multiple of num_shards={self.num_shards}: every '
      f'logical shard of the data gives the same number of rows. Use a batch_size of '
      f'{-(-self.batch_size // self.num_shards) * self.num_shards}, or fewer shards.',
    )

  def __hash__(self) -> int:
    others = (f.name for f in dataclasses.fields(self) if f.name != 'task_feature_lengths')
    lengths = frozenset(self.task_feature_lengths.items())
    return hash((lengths, *(getattr(self, name) for name in others)))

  @property
  def row_length(self) -> int:
    """Tokens of one packed row (t)."""
    return sum(self.task_feature_lengths.values())


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The run around the step.

  Attributes:
    model_dir: run directory; checkpoints, metrics and plots go there.
    total_steps: optimizer steps (t5x TRAIN_STEPS).
    relative_steps: steps after the one that initial_checkpoint was saved at, in place of
      total_steps; None for total_steps. A run that is started again does not go on farther.
    num_microbatches: pieces a batch is cut into to bound memory; does not change the loss.
    seed: of initialisation and dropout.
    eval_period, eval_steps: evaluate every eval_period steps on eval_steps batches; 0 is never.
    checkpoint_period, keep_checkpoints: save every so many steps, keep the newest so many.
    checkpoint_minutes: save also every so many minutes; None for steps alone.
    keep_every, keep_best: keep also those of every so many steps (None for no others), and so many
      that are best by keep_best_by, of those evaluated at their very step.
    keep_best_by: name of a validation metric, 'loss' (the lowest) or another (the highest).
    log_period: steps between metric records.
    router_period: steps between per-layer, per-expert load records.
    allow_data_change: continue a checkpoint of another mixture or other lengths, with the new data
      from its beginning: how a second stage or fine-tuning follows pretraining in one directory.
    initial_checkpoint: checkpoint of another run, 'RUN/checkpoint_STEP', that a new run starts
      from; its data stream starts afresh. None starts from scratch.
    initial_state: what is taken from it.
    record_batches: write a digest of every batch beside the metrics, to compare runs by.
    sample_prompts, sample_tokens: texts to continue greedily when the run is complete, and by how
      many tokens.
  """

  model_dir: str
  total_steps: int
  num_microbatches: int = 1
  seed: int = 0
  eval_period: int = 1000
  eval_steps: int = 20
  checkpoint_period: int = 1000
  keep_checkpoints: int = 5
  checkpoint_minutes: float | None = None
  keep_every: int | None = None
  keep_best: int = 0
  log_period: int = 10
  router_period: int = 10
  allow_data_change: bool = False
  initial_checkpoint: str | None = None
  initial_state: InitialState = InitialState.ALL
  record_batches: bool = False
  sample_prompts: tuple[str, ...] = ()
  sample_tokens: int = 48
  keep_best_by: str = 'loss'
  relative_steps: int | None = None

  def __post_init__(self):
    if self.relative_steps is not None:
      object.__setattr__(self, 'total_steps', self.relative_steps)
    check_fields(self, zero=('seed', 'eval_period', 'eval_steps', 'sample_tokens', 'keep_best'))
    require(bool(self.model_dir), 'TrainConfig.model_dir is empty; set MODEL_DIR.')
    if self.relative_steps is not None:
      object.__setattr__(self, 'total_steps', self.relative_steps + self.initial_step)

  @property
  def initial_step(self) -> int:
    """The step that a new run begins at.

    Raises:
      ConfigError: initial_checkpoint is not the path of a checkpoint.
    """
    if self.initial_checkpoint is None or self.initial_state is not InitialState.ALL:
      return 0
    return self.initial_parts[1]

  @property
  def initial_parts(self) -> tuple[str, int]:
    """(run directory, step) of initial_checkpoint.

    Raises:
      ConfigError: it is not the path of a checkpoint.
    """
    directory, _, name = self.initial_checkpoint.rstrip('/').rpartition('/')
    prefix, _, step = name.rpartition('_')
    require(
      prefix == 'checkpoint' and step.isdigit(),
      f'initial_checkpoint={self.initial_checkpoint!r} must end in checkpoint_STEP, the directory '
      f'of one checkpoint of a run; --gin.INITIAL_CHECKPOINT sets it.',
    )
    return directory or '.', int(step)
