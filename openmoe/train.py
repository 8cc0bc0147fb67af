"""train(): one straight line from configs to a trained model.

mesh -> data -> model -> state -> restore -> loop. There is no Trainer class and no callback
registry; to change what a run does, read this file and change it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging

from openmoe import partitioning
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.checkpoint.policy import Keep
from openmoe.compiled_step import jit_step
from openmoe.config import (
  ConfigError,
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)
from openmoe.data.stages import format_plan, plan_table
from openmoe.feed import Feed
from openmoe.health import HealthConfig
from openmoe.health.watch import Watch
from openmoe.models import build_model
from openmoe.observe.batches import BatchRecords
from openmoe.observe.metrics import MetricsWriter
from openmoe.observe.record import write_run_record
from openmoe.observe.timeline import Timeline
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.plan import check, flops_before, programme_rate
from openmoe.programme import Programme, as_programme
from openmoe.running.agreement import in_first
from openmoe.running.context import Running
from openmoe.running.lease import Lease
from openmoe.running.metadata import RunMetadata
from openmoe.running.observation import look_before_saving, record_step
from openmoe.running.origin import Origin
from openmoe.running.outcome import End, Result, show_run, why_ended
from openmoe.running.probe import Probe
from openmoe.running.signals import Signals
from openmoe.running.stuck import wait_for_data
from openmoe.running.validation import make_evaluation
from openmoe.train_step import abstract_state, init_state, state_shardings


def train(
  run: TrainConfig,
  model: ModelConfig,
  optimizer: OptimizerConfig,
  data: DataConfig | Programme,
  eval_data: DataConfig | None = None,
  mesh: MeshConfig = MeshConfig(),
  sources: Sequence[Any] = (),
  config_text: str = '',
  health: HealthConfig = HealthConfig(),
  more_metrics: Callable | None = None,
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
    health: the rules that watch the run.
    more_metrics: params -> further metrics of every validation.

  Raises:
    ConfigError: something cannot be run as configured; raised before compilation.
    NonFiniteLoss, Unhealthy: see there.
  """
  for source in sources:
    source.register()
  device_mesh = partitioning.make_mesh(mesh)
  programme = as_programme(data, run.total_steps)
  check(run, model, optimizer, programme, eval_data, device_mesh, mesh.fsdp)
  abstract, axes = abstract_state(model, optimizer)
  shardings = state_shardings(device_mesh, optimizer, abstract, axes, mesh.fsdp)
  module = build_model(model)
  schedule = learning_rate(optimizer, run.total_steps)
  if any(stage.optimizer for stage in programme.stages):
    schedule = programme_rate(programme, optimizer, run.total_steps)
  transform = make_optimizer(optimizer, axes, schedule)

  # What is opened is closed in turn, also when something raises: a save that has begun is finished.
  with contextlib.ExitStack() as opened:
    signals = Signals(device_mesh, run.checkpoint_minutes, logging.warning)
    opened.enter_context(signals)
    lease = Lease(run.model_dir, note=logging.warning)
    in_first(lambda: opened.enter_context(lease))
    timeline = opened.enter_context(Timeline(run.model_dir, logging.warning))
    checkpointer = opened.enter_context(
      Checkpointer(
        run.model_dir,
        Keep(run.keep_checkpoints, run.keep_every, run.keep_best, run.keep_best_by),
        identity(model),
        committing=functools.partial(timeline.background, 'commit'),
      )
    )
    watch = opened.enter_context(Watch(health, timeline))
    describe = RunMetadata(run, model, optimizer, programme)
    start = checkpointer.latest_step()
    if jax.process_index() == 0:
      write_run_record(run.model_dir, config_text, start or 0, stages=programme.lengths())
      describe.keep_vocabulary()
    first = start if start is not None else run.initial_step
    timeline.enter('data', first)
    feed = opened.enter_context(Feed(device_mesh, programme, first))
    opened.enter_context(jax.set_mesh(device_mesh))
    timeline.enter('restore', first)
    init = functools.partial(init_state, module, transform, run.seed)
    origin = Origin(run, checkpointer, describe, feed)
    state, metadata, told = origin.state(start, identity(model), init, abstract, shardings)
    iter(feed)  # reads ahead while the step compiles

    timeline.enter('data', first)
    evaluate = make_evaluation(run, model, module, eval_data, device_mesh, more_metrics)
    probe = Probe(module, axes, evaluate and evaluate.batches[0], device_mesh)
    probe.restore(metadata.get('probe'))
    step_fn = jit_step(run, model, transform, schedule, shardings, watch.guard)
    labels = {'tokens_before': describe.tokens_seen, 'sparse_layers': model.router_layers}
    labels |= {'flops_before': functools.partial(flops_before, model, programme)}
    writer = opened.enter_context(MetricsWriter(run.model_dir, first, run.total_steps, **labels))
    watch.open(run.model_dir, first, metadata.get('health'), writer.note)
    for text in told:
      writer.note(text)
    if first < run.total_steps:
      writer.note(format_plan(plan_table(programme, more=describe.tokens_more)))
    batches = BatchRecords(run.model_dir, first, writer.note) if run.record_batches else None
    opened.enter_context(batches or contextlib.nullcontext())
    running = Running(
      run, first, state, step_fn, feed, evaluate, checkpointer, describe, writer, signals, lease,
      timeline, batches, watch, probe,
    )  # fmt: skip
    end = _loop(running)
    step = running.step
    validation = running.validate() if evaluate and end is not End.STOPPED else {}
    timeline.enter('save', step)
    checkpointer.wait()  # a signal still finds our handlers, so it cannot cost this save
    if end is not End.COMPLETE:
      writer.note(why_ended(run, end, step, programme))
  if step > 0:
    show_run(run.model_dir)
  loss, entropy = validation.get('loss'), validation.get('unigram_entropy')
  return Result(step, end, start, loss, entropy, running.state.params)


def _loop(at: Running) -> End:
  """Steps until total_steps, a signal or the end of the data; saves what was trained."""
  # Metrics stay on the device until a record is due, so the host runs ahead of the devices.
  pending: collections.deque = collections.deque()
  run, compiled = at.run, False

  def flush() -> None:
    while pending:
      step, metrics, batch = pending.popleft()
      record_step(at, step, jax.device_get(metrics), batch)

  def save(seconds: float = 60.0) -> None:
    at.lease.check()
    flush()  # never save what has not been seen to be finite
    with at.timeline.inside('save', at.step):
      facts = at.describe(at.step) | look_before_saving(at)
      at.writer.flush()
      at.checkpointer.save(at.step, at.state, at.feed.state(seconds), facts)

  at.timeline.enter('step', at.step)
  # Signals that came while the run was opened are granted before the first step.
  if at.step < run.total_steps and at.signals.stop_now():
    return End.STOPPED
  while at.step < run.total_steps:
    if not wait_for_data(at.feed, at.signals, at.timeline, at.writer.note, at.step):
      save(seconds=0.5)
      return End.STOPPED
    batch = next(at.feed, None)
    if batch is None:
      if not at.step:
        raise ConfigError('The training data hold no batch at all; give more, or other lengths.')
      save()
      return End.DATA
    with contextlib.nullcontext() if compiled else at.aside('compile'):
      at.state, metrics = at.step_fn(at.state, batch, *at.watch.controls())
    compiled = True
    at.step += 1
    if at.batches:
      at.batches.write(at.step, at.feed.digests())
    at.lease.check()
    pending.append((at.step, metrics, at.feed.last))
    stop = at.signals.stop_after_step()
    last = stop or at.step == run.total_steps
    if at.step % run.log_period == 0 or last:
      flush()
    if at.evaluate and at.step % run.eval_period == 0 and at.step < run.total_steps:
      flush()
      at.validate()
    due = at.watch.save_due() or at.signals.save
    if due or at.step % run.checkpoint_period == 0 or last:
      save()
    if stop and at.step < run.total_steps:
      return End.STOPPED
  return End.COMPLETE
