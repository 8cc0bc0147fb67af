"""What is asked of the compiler: all that shapes one training step, and its digest."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import pathlib

import jax

from openmoe.checkpoint import fields
from openmoe.compiled_step import jit_step
from openmoe.config import Dispatch, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from openmoe.health.guard import guarded
from openmoe.models import empty_batch
from openmoe.optimizer import learning_rate, make_optimizer
from openmoe.partitioning import batch_sharding
from openmoe.pods.target import Target
from openmoe.train_step import abstract_state, state_shardings

# Rooms of openmoe/ that a training step is made of: another text of them, another program.
_ROOMS = ('types', 'config', 'partitioning', 'layers', 'models', 'losses', 'optimizer')
_ROOMS += ('microbatches', 'train_step', 'compiled_step', 'slices', 'health/guard')
LIBTPU = '0.0.42.1'


class Effort(enum.Enum):
  """How hard the compiler tries."""

  FAST = 'fast'  # memory and collectives; its seconds are too many
  FULL = 'full'  # as a run is compiled


@dataclasses.dataclass(frozen=True)
class Request:
  """One training step on one machine.

  Attributes:
    model, optimizer, mesh: of the run.
    num_microbatches, batch_size, row_length: of the step.
    target: the machine.
    effort: of the compiler.
    guarded: whether rules of health may skip the step, which is then another program.
  """

  model: ModelConfig
  optimizer: OptimizerConfig
  mesh: MeshConfig
  num_microbatches: int
  batch_size: int
  row_length: int
  target: Target
  effort: Effort = Effort.FAST
  guarded: bool = False

  @property
  def tokens(self) -> int:
    """Positions of one step."""
    return self.batch_size * self.row_length

  @property
  def digest(self) -> str:
    """Of the request, the code of the step, jax and the compiler."""
    value = fields.plain(self)
    value['model'].pop('name')
    parts = [json.dumps(value, sort_keys=True), jax.__version__, LIBTPU, _code()]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:24]

  def dropless(self) -> bool:
    moe = self.model.moe
    return moe is not None and moe.dispatch is Dispatch.DROPLESS


def _code() -> str:
  root = pathlib.Path(__file__).parent.parent
  found = (root.glob(f'{room}{end}') for room in _ROOMS for end in ('.py', '/**/*.py'))
  files = sorted({file for some in found for file in some})
  digest = hashlib.sha256()
  for file in files:
    digest.update(file.relative_to(root).as_posix().encode() + b'\0' + file.read_bytes() + b'\0')
  return digest.hexdigest()


def trace(request: Request, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh):
  """The run's own step, traced for the devices of a mesh; nothing is allocated.

  Returns:
    As jax.jit(...).trace(): it has the jaxpr, and can be lowered.
  """
  model, optimizer = request.model, request.optimizer
  abstract, axes = abstract_state(model, optimizer)
  shardings = state_shardings(mesh, optimizer, abstract, axes, request.mesh.fsdp)
  schedule = learning_rate(optimizer, max(optimizer.decay_steps, optimizer.warmup_steps) + 1)
  run = TrainConfig('planned', total_steps=1, num_microbatches=request.num_microbatches)
  step = jit_step(
    run,
    model,
    make_optimizer(optimizer, axes, schedule),
    schedule,
    shardings,
    guarded if request.guarded else lambda step: step,
  )
  placed = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
  rows = batch_sharding(mesh)
  batch = jax.eval_shape(lambda: empty_batch(request.batch_size, request.row_length))
  batch = jax.tree.map(lambda leaf: placed(leaf, rows), batch)
  arguments = [jax.tree.map(placed, abstract, shardings), batch]
  if request.guarded:
    scalar = jax.ShapeDtypeStruct((), 'float32')
    arguments.append(dict.fromkeys(('rate_scale', 'loss', 'grad_norm'), scalar))
  real = isinstance(mesh, jax.sharding.Mesh)
  with jax.set_mesh(mesh) if real else jax.sharding.use_abstract_mesh(mesh):
    return step.trace(*arguments)
