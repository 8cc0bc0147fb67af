"""The state that a run begins with: its own last, what another run left, or a new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.config import InitialState, TrainConfig
from openmoe.feed import Feed
from openmoe.running.metadata import RunMetadata, data_changed
from openmoe.train_step import TrainState
from openmoe.types import PyTree


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where a run comes from.

  Attributes:
    run: its configuration.
    checkpointer: of its own directory.
    describe: what its checkpoints say; told how many tokens the state has seen.
    feed: its data; moved to where the checkpoint was.
  """

  run: TrainConfig
  checkpointer: Checkpointer
  describe: RunMetadata
  feed: Feed

  def state(
    self,
    start: int | None,
    model: dict,
    init: Callable[[], TrainState],
    abstract: TrainState,
    shardings: PyTree,
  ) -> tuple[TrainState, dict[str, Any], list[str]]:
    """The state, placed; the metadata of the run's own checkpoint; and what to tell of it.

    Args:
      start: step of the run's own newest checkpoint, None if it has none.
      model: identity() of the model.
      init: makes the state of a run from scratch.
      abstract, shardings: shapes and placement of the state.

    Raises:
      ConfigError: another model or other data, or a path that is not a checkpoint's.
      CheckpointError: a checkpoint is damaged or absent.
    """
    init = jax.jit(init, out_shardings=shardings)
    placed = jax.tree.map(
      lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings
    )
    if start is not None:
      return self._own(start, placed)
    if not self.run.initial_checkpoint:
      return init(), {}, []
    state, tokens_seen = initial_state(self.run, model, placed, init)
    self.describe.go_on(self.run.initial_step, tokens_seen)
    return state, {}, []

  def _own(self, start: int, placed: TrainState) -> tuple[TrainState, dict[str, Any], list[str]]:
    run, describe = self.run, self.describe
    may_differ = describe.check_model(self.checkpointer.describe(start), start)
    state, positions, metadata = self.checkpointer.restore(start, placed)
    describe.go_on(start, metadata.get('tokens_seen'))
    if not data_changed(run, describe(start), metadata, start):
      self.feed.restore(positions)
    told = [f'Of the model, {phrase}; the same weights go on.' for phrase in may_differ]
    return state, metadata, [f'Resumed from checkpoint_{start}.', *told]


def initial_state(
  run: TrainConfig, model: dict, abstract: TrainState, init: Callable[[], TrainState]
) -> tuple[TrainState, object]:
  """(state, tokens it has seen) that run.initial_checkpoint gives; the data stream starts afresh.

  Args:
    model: identity() of the model.
    abstract: shapes and shardings of the state.
    init: makes the state of a run from scratch, for what is not taken over.

  Raises:
    ConfigError: the path is not a checkpoint's, or the checkpoint is of another model.
    CheckpointError: it is damaged or absent.
  """
  directory, step = run.initial_parts
  source = Checkpointer(directory, 1, model, read_only=True)
  try:
    if run.initial_state is InitialState.ALL:
      state, _, metadata = source.restore(step, abstract)
      return state, metadata.get('tokens_seen')
    return init().replace(params=source.restore_params(step, abstract.params)), 0
  finally:
    source.close()
