"""What a new run takes over from a checkpoint of another."""

from __future__ import annotations

from collections.abc import Callable

from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.config import InitialState, TrainConfig
from openmoe.train_step import TrainState


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
