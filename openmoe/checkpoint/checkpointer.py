"""Checkpoints: asynchronous, atomic, checked, and restorable onto another mesh.

A checkpoint is a directory `checkpoint_<step>` in the run directory:

  params/        the parameters alone, so that evaluation and conversion read nothing else
  state/         the rest of the train state: step and optimizer
  data/          one file per logical shard of the data: its opaque stream position
  metadata/      identity of the model, and whatever the caller says about the run, as JSON
  manifest.json  size and SHA-256 of every file (manifest.py)

It is written under a temporary name and renamed when every process is done, so a final name means a
whole checkpoint; should a file be damaged later, the newest whole one is taken instead. This module
does not decide when to save, and it does not know models: identity is an opaque mapping.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from openmoe.checkpoint import arrays, manifest, safe_json
from openmoe.checkpoint.description import Description, identity_differences, of_metadata
from openmoe.checkpoint.paths import PREFIX, Unreadable, absolute
from openmoe.checkpoint.policy import Failures, Keep, Preservation, how_far_back
from openmoe.checkpoint.positions import RestoreDataPositions, SaveDataPositions
from openmoe.config import ConfigError
from openmoe.types import PyTree

DAMAGED_PREFIX = 'damaged_checkpoint'  # what a damaged one is renamed to when its step comes again
# Of files; of TensorStore, for a full disk too; and where another process does not arrive.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class CheckpointError(RuntimeError):
  """No checkpoint that can be trusted could be read, or none could be written."""

  exit_code = 65


class Checkpointer:
  """Saves and restores the train state of one run directory.

  Every process calls every method, in the same order. A failed save never stops training: it is
  reported through `note`, older checkpoints stay, and `wait()` raises it.

  Args:
    model_dir: run directory, local or gs://, the same for all processes; made if need be.
    keep: newest checkpoints to keep, or a Keep.
    identity: of the model, as description.identity gives it; checkpoints of another identity are
      refused. None takes whatever a checkpoint says it is; only to read.
    read_only: for evaluation beside a running training: writes, renames and deletes nothing.
    note: receives warnings and errors as one line of text each.
    committing: is told a step, in the background of process 0, when all of it is written and its
      name is about to be.

  Raises:
    ConfigError: if the run directory cannot be made or, when read_only, is not there.
  """

  def __init__(
    self,
    model_dir: str | os.PathLike,
    keep: int | Keep,
    identity: Mapping[str, Any] | None,
    *,
    read_only: bool = False,
    note: Callable[[str], None] = logging.warning,
    committing: Callable[[int], None] = lambda step: None,
  ):
    path = os.fspath(model_dir)
    self._directory = absolute(path)
    self._identity = json.loads(json.dumps(identity))
    self._note = note
    self._committing = committing
    self._read_only = read_only
    self._pending: int | None = None  # step whose save may still run in the background
    self._failure: CheckpointError | None = None
    self._alone = False  # whether the other processes can no longer be asked
    self._verified: set[int] = set()
    self._damaged: set[int] = set()
    if read_only and not self._directory.exists():
      raise ConfigError(f'{self._directory} does not exist; there is no checkpoint to read.')
    self._keep = Keep(keep) if isinstance(keep, int) else keep
    self._losses: dict[int, float] = {}
    self._failures = Failures()
    try:
      self._manager = self._open_manager()
    except OSError as error:
      raise ConfigError(
        f'The run directory {self._directory} cannot be used: {error}. Set MODEL_DIR to a place '
        'that can be written.'
      ) from error

  def _open_manager(self) -> ocp.CheckpointManager:
    # Directories are made in the foreground: when that fails, writers waiting for a directory in
    # the background would hang until the time-out.
    asynchronous = ocp.options.AsyncOptions(
      create_directories_asynchronously=False, post_finalization_callback=self._write_manifest
    )
    options = ocp.CheckpointManagerOptions(
      step_prefix=PREFIX,
      max_to_keep=None,
      preservation_policy=None
      if self._read_only
      else Preservation(self._keep, self._losses, self._damaged),
      create=not self._read_only,
      cleanup_tmp_directories=not self._read_only,
      read_only=self._read_only,
      save_interval_steps=0 if self._read_only else 1,
      save_root_metadata=False,
      async_options=asynchronous,
    )
    arrays.tell_once()
    verbosity = logging.get_verbosity()
    if self._read_only:
      logging.set_verbosity(logging.ERROR)  # orbax warns that what was asked for will be done
    try:
      return ocp.CheckpointManager(
        self._directory, options=options, handler_registry=arrays.registry('params', 'state')
      )
    finally:
      logging.set_verbosity(verbosity)

  def _path(self, step: int) -> epath.Path:
    return self._directory / f'{PREFIX}_{step}'

  def _write_manifest(self) -> None:
    """Called by orbax on process 0, in the background, when all is written but nothing named."""
    assert self._pending is not None
    self._committing(self._pending)
    temporary = self._directory / f'{PREFIX}_{self._pending}.orbax-checkpoint-tmp'
    # Object stores cannot rename, so there orbax writes in place and marks completion by a file.
    manifest.write(
      temporary if temporary.exists() else self._path(self._pending), step=self._pending
    )

  # --- which checkpoint to use

  def _problem(self, step: int) -> str | None:
    """What is wrong with a checkpoint as far as any process sees, or None."""
    if step in self._verified:
      return None
    problem = manifest.find_problem(
      self._path(step), step, share=jax.process_index(), of=jax.process_count()
    )
    if jax.process_count() > 1:
      seen = multihost_utils.process_allgather(np.array([problem is not None]))
      if np.any(seen) and problem is None:
        problem = f'is damaged, as process {int(np.argmax(np.ravel(seen)))} found'
    (self._damaged if problem else self._verified).add(step)
    return problem

  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint; None when there is no checkpoint at all.

    Damaged newer ones are passed over with a note; files are read once to check them.

    Raises:
      CheckpointError: if there are checkpoints, but none is whole: starting anew in silence would
        throw the run away.
    """
    self._settle()
    self._manager.reload()
    self._learn_losses()
    problems = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      problem = self._problem(step)
      if problem is None:
        if problems:
          self._note(f'{"; ".join(problems)}. Using {PREFIX}_{step}, the newest whole one.')
        return step
      problems.append(f'{PREFIX}_{step} {problem}')
    if problems:
      raise CheckpointError(
        f'No checkpoint in {self._directory} is whole: {"; ".join(problems)}. Restore one from a '
        'copy; or move them away, or set another MODEL_DIR, to start anew.'
      )
    return None

  def _learn_losses(self) -> None:
    """Reads what checkpoints of former starts say of their validation."""
    if not self._keep.best or self._read_only:
      return
    for step in self._manager.all_steps():
      with contextlib.suppress(CheckpointError):  # a damaged one is none of the best
        self._losses[step] = self._keep.loss_of(self._facts(step)['metadata'])

  # --- save

  def save(
    self, step: int, state: PyTree, data: Mapping[str, bytes], metadata: Mapping[str, Any]
  ) -> None:
    """Starts writing a checkpoint; returns when the arrays are copied, before they are written.

    Args:
      step: its number. A step that is already there is left alone: its state is the same.
      state: a TrainState (fields params, opt_state, step) of jax.Array.
      data: stream positions by logical shard; those that this process reads. Names must be unique
        over all processes.
      metadata: JSON-able facts about the run.

    Raises:
      TypeError: if metadata is not JSON-able.
    """
    assert not self._read_only, 'save() on a read-only Checkpointer'
    facts = {'step': step, 'identity': self._identity, 'metadata': dict(metadata)}
    facts = json.loads(json.dumps(facts))
    self._losses[step] = self._keep.loss_of(metadata)
    self._settle()
    self._move_damaged_away(step)
    if step in self._manager.all_steps():
      return
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params, save_args=arrays.save_args(state.params)),
      state=ocp.args.StandardSave(state.replace(params=None)),
      data=SaveDataPositions(dict(data)),
      metadata=ocp.args.JsonSave(facts),
    )
    self._pending = step
    error = None
    try:
      self._manager.save(step, args=items, force=True)
    except _WRITE_ERRORS as caught:
      error = caught
    self._agree_on_failure(error)

  def _settle(self) -> None:
    """Waits for the save in the background; a failure is noted and kept for wait()."""
    error = None
    try:
      self._manager.wait_until_finished()
    except _WRITE_ERRORS as caught:
      error = caught
    self._agree_on_failure(error)
    if self._pending is not None:
      # What was just written from memory need not be read back.
      self._verified.add(self._pending)
      self._failure = None
      self._failures.reset()
    self._pending = None

  def _agree_on_failure(self, error: Exception | None) -> None:
    """Makes a failure of one process a failure of all, and starts afresh after it."""
    if self._pending is None:
      return
    if jax.process_count() > 1 and not self._alone:
      failed = np.ravel(multihost_utils.process_allgather(np.array([error is not None])))
      if np.any(failed) and error is None:
        error = RuntimeError(f'process {int(np.argmax(failed))} could not write its part')
    if error is None:
      return
    step, self._pending = self._pending, None
    # orbax keeps errors of its background writers and would raise them again in the next save.
    with contextlib.suppress(*_WRITE_ERRORS):
      self._manager.close()
    if jax.process_index() == 0:
      self._remove_leftovers(step)
    if self._alone:
      self._note(f'{PREFIX}_{step} could not be written ({type(error).__name__}: {error}).')
      return
    self._manager = self._open_manager()
    good = set(self._manager.all_steps()) - self._damaged - {step}
    self._failure = CheckpointError(
      f'{self._failures.another()}{PREFIX}_{step} could not be written to {self._directory} '
      f'({type(error).__name__}: {error}); {how_far_back(step, good, PREFIX)}. Make room or make '
      'the directory writable: the next save tries again.'
    )
    self._failure.exit_code = 64  # what is there is sound
    self._failure.__cause__ = error
    self._note(str(self._failure))

  def _remove_leftovers(self, step: int) -> None:
    """Removes what a failed save has written: on a full disk the space is needed.

    orbax reports the first writer that fails while others still write, so what is removed may come
    back; it is gone when it stays away. What cannot be removed goes at the next start.
    """
    leftovers = self._directory / f'{PREFIX}_{step}.orbax-checkpoint-tmp'
    away, problem = 0, None
    for _ in range(20):
      away = 0 if leftovers.exists() else away + 1
      if away == 3:
        return
      try:
        if not away:
          leftovers.rmtree()
      except OSError as error:
        problem = error
      time.sleep(0.1)
    self._note(f'{leftovers} could not be removed: {problem}')

  def _move_damaged_away(self, step: int) -> None:
    """Renames damaged checkpoints from `step` on, whose places this run fills again."""
    again = sorted(s for s in self._damaged if s >= step)
    if not again:
      return
    if jax.process_index() == 0:
      for old in again:
        target = self._directory / f'{DAMAGED_PREFIX}_{old}'
        if target.exists():
          target.rmtree()
        self._path(old).rename(target)
        self._note(f'The damaged {PREFIX}_{old} is now {target.name}; delete it at leisure.')
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('openmoe:move_damaged_away')
    self._damaged -= set(again)
    self._manager.reload()

  # --- restore

  def _check(self, step: int) -> dict[str, Any]:
    """Metadata of a checkpoint, once it is known to be whole and of this model.

    Raises:
      CheckpointError: if the checkpoint is absent or damaged.
      ConfigError: if it is of another model.
    """
    self._settle()
    path = self._path(step)
    if not path.exists():
      there = sorted(self._manager.all_steps()) or 'none'
      raise CheckpointError(f'{path} does not exist; steps that do: {there}.')
    if problem := self._problem(step):
      raise CheckpointError(f'{path} {problem}. Take another step: {self._manager.all_steps()}.')
    facts = self._facts(step)
    mine = facts['identity'] if self._identity is None else self._identity
    differences = identity_differences(facts['identity'], mine)
    if differences:
      raise ConfigError(
        f'{path} is of another model: {"; ".join(differences)}. Set another MODEL_DIR for this '
        'model, or use the configuration that the checkpoint was trained with.'
      )
    return facts['metadata']

  def _facts(self, step: int) -> dict[str, Any]:
    """The metadata file of a checkpoint: step, identity, metadata."""
    try:
      facts = safe_json.read(self._path(step) / 'metadata' / 'metadata')
      safe_json.field(facts, 'metadata', dict, str(self._path(step)))
      return facts
    except (OSError, Unreadable) as error:
      raise CheckpointError(f'{self._path(step)} is damaged: {error}') from error

  def describe(self, step: int) -> Description | None:
    """What a whole checkpoint says of itself; None when it tells its sizes alone.

    Raises:
      CheckpointError: if the checkpoint is absent or damaged.
      ConfigError: if its description cannot be used.
    """
    self._check(step)
    return of_metadata(self._facts(step), str(self._path(step) / 'metadata' / 'metadata'))

  def identity(self, step: int) -> dict[str, Any]:
    """What a checkpoint's identity says."""
    return self._facts(step)['identity']

  def _read(self, step: int, **items: ocp.args.CheckpointArgs):
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, OSError) as error:
      # It was whole when it was checked, which need not last.
      path, unread = self._path(step), error if isinstance(error, OSError) else None
      if problem := unread or manifest.find_problem(path, step):
        raise CheckpointError(f'{path} is damaged: {problem}') from error
      raise ConfigError(
        f'{path} holds another train state than this configuration makes (another '
        f'optimizer, perhaps): {error}. Set another MODEL_DIR, or the former configuration.'
      ) from error

  def restore(
    self, step: int, abstract_state: PyTree
  ) -> tuple[PyTree, Mapping[str, bytes], dict[str, Any]]:
    """Reads a checkpoint, laid out as the shardings of `abstract_state` ask.

    Args:
      step: as latest_step() returns it.
      abstract_state: the TrainState as jax.ShapeDtypeStruct with shardings. Mesh and number of
        processes need not be those of the save.

    Returns:
      (state, data, metadata): data maps every logical shard's name to its position, whichever
      process wrote it; metadata is what was given to save().

    Raises:
      CheckpointError: if the checkpoint is absent or damaged.
      ConfigError: if it is of another model or train state.
    """
    metadata = self._check(step)
    read = self._read(
      step,
      params=ocp.args.StandardRestore(arrays.with_sharding(abstract_state.params)),
      state=ocp.args.StandardRestore(arrays.with_sharding(abstract_state.replace(params=None))),
      data=RestoreDataPositions(),
    )
    return read.state.replace(params=read.params), read.data, metadata

  def restore_params(self, step: int, abstract_params: PyTree) -> PyTree:
    """Reads the parameters alone; see restore()."""
    self._check(step)
    return self._read(
      step, params=ocp.args.StandardRestore(arrays.with_sharding(abstract_params))
    ).params

  def wait(self) -> None:
    """Returns when the last save is complete.

    Raises:
      CheckpointError: if it failed; once per failure.
    """
    self._settle()
    failure, self._failure = self._failure, None
    if failure is not None:
      raise failure

  def newest(self) -> int | None:
    """Step of the newest checkpoint that is written and not known to be damaged, if there is one.

    Waits for a save in the background. Unlike latest_step() it reads no files.
    """
    self._settle()
    return max(set(self._manager.all_steps()) - self._damaged, default=None)

  def close(self) -> None:
    """Waits for the last save and frees the background threads; failures are only noted."""
    self._settle()
    self._manager.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
    """Closes. After an exception a save that has begun is finished or removed, without the others:

    what raised here need not have raised in every process, so nothing can be agreed any more.
    """
    self._alone |= kind is not None
    self.close()
