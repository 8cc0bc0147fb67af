"""A run's stages, each compiled for a machine, and all that follows from it."""

from __future__ import annotations

import dataclasses
import math

import jax

from openmoe import plan
from openmoe.health.rules import Action
from openmoe.pods import collectives, flops, hlo, memory, step_time
from openmoe.pods.compiler import Compiled, compiled
from openmoe.pods.request import Effort, Request
from openmoe.pods.target import Target
from openmoe.programme import Programme, as_programme
from openmoe.train_step import abstract_state

DAY = 86400.0
HOST_DEVICES = 4  # of a TPU host, which write together


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """One step on a machine.

  Attributes:
    request, compiled: what was asked, and what the compiler made of it; None for GPUs.
    flops: by purpose.
    memory: by kind; None for GPUs.
    moved: what devices send one another; () where it was refused.
    time: None where it was refused, and for GPUs.
  """

  request: Request
  compiled: Compiled | None
  flops: flops.Flops
  memory: memory.Memory | None
  moved: tuple[collectives.Collective, ...] = ()
  time: step_time.StepTime | None = None

  @property
  def fits(self) -> bool:
    return self.compiled is None or self.compiled.fits

  def utilisation(self, seconds: float) -> float:
    """Model FLOPs over what the devices could do in so many seconds."""
    target = self.request.target
    return self.flops.model / (seconds * target.device_count * target.device.flops)


@dataclasses.dataclass(frozen=True)
class StageTime:
  """A stage of the programme: its steps, and its (low, high) days and device-hours."""

  name: str
  steps: int
  tokens: int
  days: tuple[float, float]
  device_hours: tuple[float, float]


def requests(
  arguments: dict, target: Target, effort: Effort, checked: bool = True
) -> list[Request]:
  """One request a stage of the run.

  Args:
    arguments: of openmoe.train.train.
    checked: refuses what the mesh cannot run; a search looks for what it can.

  Raises:
    ConfigError: the run cannot be split over the machine.
  """
  run, model, mesh = (arguments[name] for name in ('run', 'model', 'mesh'))
  programme = as_programme(arguments['data'], run.total_steps)
  if checked:
    abstract = target.abstract_mesh(mesh)
    plan.check(run, model, arguments['optimizer'], programme, None, abstract, mesh.fsdp)
  rules = arguments['health'].table() if arguments.get('health') else ()
  acting = any(rule.action in (Action.SKIP, Action.LOWER_RATE) for rule in rules)
  step = lambda data: Request(
    model,
    arguments['optimizer'],
    mesh,
    run.num_microbatches,
    data.batch_size,
    data.row_length,
    target,
    effort,
    acting,
  )
  return [step(stage.data) for stage in programme.stages]


def plan_step(request: Request) -> StepPlan:
  """Compiles a step, or finds it compiled, and measures it.

  Raises:
    ConfigError: see compiler.compiled.
  """
  if not request.target.is_tpu:
    return StepPlan(request, None, flops.count(request), None)
  one = compiled(request)
  counted = flops.count(request)
  if not one.fits:
    return StepPlan(request, one, counted, memory.measure(one))
  module = hlo.parse(one.text)
  hosts = [tuple(place) for place in one.facts['hosts']]
  moved = collectives.find(module, one.facts['mesh'], hosts)
  time = step_time.estimate(one, module, moved, counted)
  return StepPlan(request, one, counted, memory.measure(one), tuple(moved), time)


def stage_times(programme: Programme, steps: list[StepPlan]) -> list[StageTime]:
  """Days and device-hours of every stage whose step has a time."""
  found = []
  for stage, step in zip(programme.stages, steps, strict=True):
    if step.time is None:
      continue
    days = tuple(stage.steps * s / DAY for s in (step.time.low, step.time.high))
    hours = tuple(d * 24 * step.request.target.device_count for d in days)
    found.append(StageTime(stage.name, stage.steps, stage.tokens, days, hours))
  return found


def checkpoint_bytes(request: Request) -> int:
  """Parameters and optimizer state of the whole run, as a checkpoint holds them."""
  state, _ = abstract_state(request.model, request.optimizer)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def remedies(step: StepPlan) -> list[str]:
  """What would make a step fit, by what takes the room; best first."""
  found, request, room = [], step.request, step.memory
  mesh, model = request.mesh, request.model
  state, free = room.parameters + room.optimizer, room.limit - room.parameters - room.optimizer
  shards = request.target.device_count // mesh.num_model_partitions
  if not mesh.fsdp and shards > mesh.num_expert_partitions and state > room.limit / 8:
    found.append(f'--gin.FSDP=True splits the state of {gib(state)} GiB over the data axis too')
  if model.remat.value != 'full':
    found.append("--gin.config.ModelConfig.remat=\"'full'\" keeps the blocks' inputs alone")
  rows = request.batch_size // shards
  if free > 0 and rows > request.num_microbatches:
    fitting = [n for n in range(request.num_microbatches + 1, rows + 1) if rows % n == 0]
    needs = lambda n: state + (room.peak - state) * request.num_microbatches / n
    enough = next((n for n in fitting if 1.05 * needs(n) <= room.limit), fitting[-1])
    found.append(f'--gin.NUM_MICROBATCHES={enough} needs some {gib(needs(enough))} GiB')
  if free <= 0:
    found.append(f'{math.ceil(state / room.limit)} times the devices hold the state alone')
  found.append('a topology with more devices and the same batch')
  return found


def gib(size: float) -> str:
  return f'{size / 2**30:.1f}'
