"""train(): one straight line from configs to a trained model.

mesh -> data -> model -> state -> restore -> loop. There is no Trainer class and no callback
registry; to change what a run does, read this file and change it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from openmoe import partitioning
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.config import (
  ConfigError,
  DataConfig,
  InitialState,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)
from openmoe.data.stages import format_plan, plan_table
from openmoe.data.statistics import unigram_entropy
from openmoe.feed import Feed, evaluation_feed
from openmoe.models import build_model
from openmoe.observe import pictures
from openmoe.observe.metrics import MetricsWriter
from openmoe.observe.record import write_run_record
from openmoe.optimizer import make_optimizer, programme_rate
from openmoe.plan import abstract_state, flops_before
from openmoe.programme import Programme, as_programme, check_optimizers
from openmoe.train_state import TrainState, identity, init_state, model_fields, state_shardings
from openmoe.train_step import eval_step, train_step
from openmoe.types import Batch, PyTree


class NonFiniteLoss(RuntimeError):
  """Training diverged; the message names the step, the batch and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    step: optimizer steps done.
    complete: False when a signal stopped the run.
    resumed_from: step it was restored at, None for a fresh start.
    validation_loss: nats per target token, None without evaluation.
    unigram_entropy: of the validation targets, nats; what knowing only frequencies would give.
    params: the parameters, on the mesh.
  """

  step: int
  complete: bool
  resumed_from: int | None
  validation_loss: float | None
  unigram_entropy: float | None
  params: PyTree


class Preemption:
  """Notes SIGTERM and SIGINT; all processes stop after the same step."""

  def __enter__(self) -> Preemption:
    self._seen: int | None = None
    self._old = {}
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number, frame) -> None:
    if self._seen is not None and number == signal.SIGINT:
      raise KeyboardInterrupt  # the second Ctrl-C means it
    self._seen = number

  def stop_after(self, step: int) -> bool:
    """Whether this step is the last; agreed between processes."""
    if jax.process_count() == 1:
      return self._seen is not None
    seen = np.array([self._seen is not None])
    return bool(multihost_utils.process_allgather(seen).any())


def check(
  run: TrainConfig,
  model: ModelConfig,
  optimizer: OptimizerConfig,
  programme: Programme,
  eval_data: DataConfig | None,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> None:
  """Refuses what this mesh cannot run, in any stage.

  Raises:
    ConfigError: with the numbers, the rule and the remedy.
  """
  partitioning.check_divisible(model, mesh)
  check_optimizers(programme, optimizer)
  for stage in programme.stages:
    partitioning.check_batch(model, stage.data, run.num_microbatches, mesh)
  if eval_data is not None and run.eval_period:
    partitioning.check_batch(model, eval_data, 1, mesh)


def train(
  run: TrainConfig,
  model: ModelConfig,
  optimizer: OptimizerConfig,
  data: DataConfig | Programme,
  eval_data: DataConfig | None = None,
  mesh: MeshConfig = MeshConfig(),
  sources: Sequence[Any] = (),
  config_text: str = '',
) -> Result:
  """Trains to run.total_steps, from the newest checkpoint of run.model_dir if there is one.

  Everything random is a function of (run.seed, data.seed, step), so a run that is killed and
  started again gives the same numbers as one that is not.

  Args:
    run, model, optimizer, mesh: see openmoe.config.
    data: what is trained on: one DataConfig for the whole run, or a Programme of stages.
    eval_data: what is evaluated every run.eval_period steps; None for no evaluation.
    sources: objects whose register() is called first: how a run brings data of its own.
    config_text: the configuration as text, written down in the run directory.

  Raises:
    ConfigError: something cannot be run as configured; raised before compilation.
    NonFiniteLoss: see there.
  """
  for source in sources:
    source.register()
  device_mesh = partitioning.make_mesh(mesh)
  programme = as_programme(data, run.total_steps)
  check(run, model, optimizer, programme, eval_data, device_mesh)
  abstract, axes = abstract_state(model, optimizer)
  shardings = state_shardings(device_mesh, optimizer, abstract, axes, mesh.fsdp)
  module = build_model(model)
  schedule = programme_rate(programme, optimizer, run.total_steps)
  transform = make_optimizer(optimizer, axes, schedule)

  checkpointer = Checkpointer(run.model_dir, run.keep_checkpoints, identity(model))
  describe = functools.partial(_metadata, run, model, programme)
  start = checkpointer.latest_step()
  if jax.process_index() == 0:
    write_run_record(run.model_dir, config_text, start or 0)
  first = start if start is not None else _initial_step(run)
  with Feed(device_mesh, programme, first) as feed, jax.set_mesh(device_mesh):
    init = jax.jit(
      functools.partial(init_state, module, transform, run.seed), out_shardings=shardings
    )
    placed = jax.tree.map(
      lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
      abstract,
      shardings,
    )
    if start is not None:
      state, positions, metadata = checkpointer.restore(start, placed)
      if not _data_changed(run, describe(start), metadata, start):
        feed.restore(positions)
    elif run.initial_checkpoint:
      state = initial_state(run, identity(model), placed, init)
    else:
      state = init()
    iter(feed)  # reads ahead while the step compiles

    evaluate = _evaluator(run, model, module, eval_data, device_mesh)
    step_fn = jax.jit(
      functools.partial(
        train_step,
        model=module,
        config=model,
        optimizer=transform,
        schedule=schedule,
        num_microbatches=run.num_microbatches,
        seed=run.seed,
      ),
      donate_argnums=0,
      out_shardings=(shardings, None),
    )
    with (
      MetricsWriter(
        run.model_dir,
        start_step=first,
        total_steps=run.total_steps,
        tokens_before=programme.tokens_before,
        flops_before=functools.partial(flops_before, model, programme),
        sparse_layers=model.router_layers,
      ) as writer,
      Preemption() as preemption,
    ):
      if start is not None:
        writer.note(f'Resumed from checkpoint_{start}.')
      if first < run.total_steps:
        writer.note(format_plan(plan_table(programme)))
      state, complete = _loop(
        run, describe, state, first, step_fn, feed, evaluate, checkpointer, writer, preemption
      )
      step = int(state.step)
      validation = evaluate(state.params) if complete and evaluate else {}
      if validation:
        writer.write(step, validation, kind='validation')
    checkpointer.wait()
    checkpointer.close()
    if jax.process_index() == 0 and step > 0:
      pictures.plot_run(run.model_dir)
  return Result(
    step,
    complete,
    start,
    validation.get('loss'),
    validation.get('unigram_entropy'),
    state.params,
  )


def _initial_parts(run: TrainConfig) -> tuple[str, int]:
  """(run directory, step) of run.initial_checkpoint.

  Raises:
    ConfigError: the path is not a checkpoint's.
  """
  directory, _, name = run.initial_checkpoint.rstrip('/').rpartition('/')
  prefix, _, step = name.rpartition('_')
  if prefix != 'checkpoint' or not step.isdigit():
    raise ConfigError(
      f'initial_checkpoint={run.initial_checkpoint!r} must end in checkpoint_STEP, the directory '
      f'of one checkpoint of a run; --gin.INITIAL_CHECKPOINT sets it.'
    )
  return directory or '.', int(step)


def _initial_step(run: TrainConfig) -> int:
  """The step that a new run begins at."""
  if run.initial_checkpoint and run.initial_state is InitialState.ALL:
    return _initial_parts(run)[1]
  return 0


def initial_state(
  run: TrainConfig, model: dict, abstract: TrainState, init: Callable[[], TrainState]
) -> TrainState:
  """The state that run.initial_checkpoint gives a new run; its data stream starts afresh.

  Args:
    model: identity() of the model.
    abstract: shapes and shardings of the state.
    init: makes the state of a run from scratch, for what is not taken over.

  Raises:
    ConfigError: the path is not a checkpoint's, or the checkpoint is of another model.
    CheckpointError: it is damaged or absent.
  """
  directory, step = _initial_parts(run)
  source = Checkpointer(directory, 1, model, read_only=True)
  try:
    if run.initial_state is InitialState.ALL:
      return source.restore(step, abstract)[0]
    return init().replace(params=source.restore_params(step, abstract.params))
  finally:
    source.close()


def _loop(
  run: TrainConfig,
  describe: Callable[[int], dict],
  state: TrainState,
  step: int,
  step_fn: Callable,
  feed: Feed,
  evaluate: Callable | None,
  checkpointer: Checkpointer,
  writer: MetricsWriter,
  preemption: Preemption,
) -> tuple[TrainState, bool]:
  """Steps until total_steps or a signal; returns the state and whether it is complete."""
  # Metrics stay on the device until a record is due, so the host runs ahead of the devices.
  pending: collections.deque = collections.deque()
  saved = step or None
  compiled = False

  def flush() -> None:
    while pending:
      at, metrics, batch = pending.popleft()
      _record(run, at, jax.device_get(metrics), batch, saved, writer)

  while step < run.total_steps:
    batch = next(feed)
    with contextlib.nullcontext() if compiled else writer.paused():
      state, metrics = step_fn(state, batch)
    compiled = True
    step += 1
    pending.append((step, metrics, feed.last))
    stop = preemption.stop_after(step)
    last = stop or step == run.total_steps
    if step % run.log_period == 0 or last:
      flush()
    if evaluate and run.eval_period and step % run.eval_period == 0 and step < run.total_steps:
      flush()
      with writer.paused():
        writer.write(step, evaluate(state.params), kind='validation')
    if step % run.checkpoint_period == 0 or last:
      flush()  # never save what has not been seen to be finite
      writer.flush()
      checkpointer.save(step, state, feed.state(), describe(step))
      saved = step
    if stop:
      writer.note(f'Stopped by a signal after step {step}; the same command continues.')
      return state, step == run.total_steps
  return state, True


def _data_changed(run: TrainConfig, now: dict, metadata: dict, step: int) -> bool:
  """Whether the checkpoint was made on other data, from which this run may go on.

  Raises:
    ConfigError: other data, and run.allow_data_change is off.
  """
  names = [n for n in ('mixture', 'task_feature_lengths') if metadata.get(n) != now[n]]
  if names and not run.allow_data_change:
    changes = '; '.join(f'{n} is {metadata.get(n)} there and {now[n]} here' for n in names)
    raise ConfigError(
      f'checkpoint_{step} was trained on other data: {changes}. To go on with the new data from '
      f'its beginning set ALLOW_DATA_CHANGE = True; or use another MODEL_DIR.'
    )
  return bool(names)


def _metadata(run: TrainConfig, model: ModelConfig, programme: Programme, step: int) -> dict:
  """What a checkpoint says of the run; `model` is what convert reads."""
  stage = programme.stages[programme.at(min(max(step, 1), programme.total_steps) - 1)[0]]
  data = stage.data
  return {
    'tokens_seen': programme.tokens_before(step),
    'stage': stage.name,
    'mixture': data.mixture_or_task_name,
    'task_feature_lengths': dict(data.task_feature_lengths),
    'data_seed': data.seed,
    'seed': run.seed,
    'model': model_fields(model),
    'saved_at': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
  }


def _record(
  run: TrainConfig, step: int, metrics: dict, batch: Batch, saved: int | None, writer: MetricsWriter
) -> None:
  """Writes one step's metrics when due; stops the run when they are not finite."""
  scalars = {name: float(value) for name, value in metrics['scalars'].items()}
  if not all(math.isfinite(scalars[name]) for name in ('loss', 'grad_norm')):
    _diverged(run, step, scalars, batch, saved)
  router = metrics['router']
  if router is not None:
    loads_le = np.asarray(router.expert_load_e)
    scalars['dropped_fraction'] = float(np.mean(router.dropped_fraction))
    scalars['expert_usage'] = float(np.mean(router.expert_usage))
    scalars['router_confidence'] = float(np.mean(router.router_confidence))
    if step % run.router_period == 0:
      writer.write_router(
        step,
        {'expert_load': loads_le, 'dropped_fraction': np.asarray(router.dropped_fraction)},
      )
  if step % run.log_period == 0 or step == run.total_steps:
    writer.write(step, scalars)


def _diverged(run: TrainConfig, step: int, scalars: dict, batch: Batch, saved: int | None) -> None:
  """Keeps the batch for inspection and raises NonFiniteLoss."""
  name = f'nonfinite_step_{step}_process_{jax.process_index()}.npz'
  path = os.path.join(run.model_dir, name)
  if '://' in run.model_dir:
    path = os.path.abspath(name)
  np.savez(path, **{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
  good = 'none was written' if saved is None else f'checkpoint_{saved}'
  raise NonFiniteLoss(
    f'Step {step}: loss {scalars["loss"]}, gradient norm {scalars["grad_norm"]}. Its batch is in '
    f'{path}; the last good checkpoint: {good}. Start again with a lower learning rate, or look at '
    f'the batch.'
  )


def _evaluator(
  run: TrainConfig,
  model: ModelConfig,
  module,
  eval_data: DataConfig | None,
  mesh: jax.sharding.Mesh,
) -> Callable[[PyTree], dict[str, float]] | None:
  """params -> validation metrics over the same batches every time; None when it is off."""
  if eval_data is None or not run.eval_period or not run.eval_steps:
    return None
  batches = evaluation_feed(mesh, eval_data, run.eval_steps)
  entropy = unigram_entropy(_on_host(batches))
  step_fn = jax.jit(functools.partial(eval_step, model=module, config=model))

  def evaluate(params: PyTree) -> dict[str, float]:
    parts = [jax.device_get(step_fn(params, batch)) for batch in batches]
    totals = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
    tokens = totals['target_tokens']
    if not tokens:
      raise ConfigError(
        f'The {len(batches)} evaluation batches of {eval_data.mixture_or_task_name} hold no '
        f'target tokens; give the split more data or set EVAL_PERIOD = 0.'
      )
    return {
      'loss': totals['cross_entropy'] / tokens,
      'accuracy': totals['correct'] / tokens,
      'unigram_entropy': entropy,
    }

  return evaluate


def _on_host(batches: list[Batch]) -> Iterator[Batch]:
  """Global batches as numpy, on every process."""
  for batch in batches:
    if jax.process_count() == 1:
      yield jax.tree.map(np.asarray, batch)
    else:
      yield jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), batch)
