"""Tries meshes, microbatches and rematerialisation for a run on a machine; the best that fit.

What a mesh cannot run, and what its state and kept block inputs alone overfill, is left out
unasked; the rest is ordered by products and transfers as formulas have them, and compiled in that
order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from openmoe import plan
from openmoe.config import ConfigError, MeshConfig, Remat
from openmoe.pods import memory
from openmoe.pods.request import Request
from openmoe.pods.run import StepPlan, gib, plan_step
from openmoe.programme import Programme

# Of executed over model FLOPs: a block's forward pass once more. Keeping the results of products
# costs as much in memory traffic as it saves, by the compiler's own cycles (docs/PODS.md).
_AGAIN = {Remat.FULL: 4 / 3, Remat.DOTS: 4 / 3, Remat.NONE: 1.0}
_PRODUCTS = 0.5  # of the peak, for the order alone


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run a step.

  Attributes:
    least_bytes: state and kept block inputs of a device; what it needs is never less.
    seconds: by formulas, for the order alone.
  """

  request: Request
  least_bytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class Found:
  """What a search did.

  Attributes:
    plans: all that were compiled, those that fit first, by the lower end of their time.
    impossible: ways that the mesh cannot run.
    pruned: ways that do not fit whatever the compiler does.
    left: ways that were not compiled.
  """

  plans: tuple[StepPlan, ...]
  impossible: int
  pruned: int
  left: int


def search(
  request: Request,
  check: Callable[[Request], None],
  compiles: int,
  note: Callable[[str], None] = lambda line: None,
  planned: Callable[[Request], StepPlan] = plan_step,
) -> Found:
  """Compiles the most promising ways to run a step.

  Args:
    request: the step as it is configured; it is tried too, if it can be.
    check: raises ConfigError for what the mesh cannot run.
    compiles: so many at most.
    note: is told of every one.
  """
  good, impossible, pruned = [], 0, 0
  limit = request.target.device.hbm_bytes
  for way in ways(request):
    try:
      check(way)
    except ConfigError:
      impossible += 1
      continue
    one = candidate(way)
    if one.least_bytes > limit:
      pruned += 1
    else:
      good.append(one)
  order = list(Remat)[::-1]  # of ways that are equal otherwise, what keeps least comes first
  good.sort(key=lambda one: (one.seconds, order.index(one.request.model.remat)))
  chosen = good[:compiles]
  if all(one.request != request for one in chosen):
    chosen = [one for one in good if one.request == request] + chosen[: compiles - 1]
  plans = []
  for one in chosen:
    note(f'compiles {bindings(one.request)} (at least {gib(one.least_bytes)} GiB)')
    plans.append(planned(one.request))
  plans.sort(key=lambda p: (not p.fits, p.time.low if p.time else p.memory.peak))
  return Found(tuple(plans), impossible, pruned, len(good) - len(chosen))


def ways(request: Request) -> Iterator[Request]:
  """The step on other meshes, in other numbers of microbatches, with other rematerialisation."""
  devices = request.target.device_count
  experts = request.model.moe.num_experts if request.model.moe else 1
  powers = lambda most: [2**i for i in range(most.bit_length()) if 2**i <= most]
  given = request.mesh.num_expert_partitions, request.mesh.num_model_partitions
  pairs = set(itertools.product(powers(experts), powers(16))) | {given}
  counts = sorted({1, 2, 4, 8, 16, request.num_microbatches})
  remats = sorted({Remat.FULL, Remat.DOTS, request.model.remat}, key=lambda r: r.value)
  for (expert, model), count, remat in itertools.product(sorted(pairs), counts, remats):
    if devices % (expert * model):
      continue
    for fsdp in (False, True):
      if fsdp and devices == expert * model:
        continue  # no data axis to split anything over
      yield dataclasses.replace(
        request,
        mesh=MeshConfig(expert, model, fsdp),
        num_microbatches=count,
        model=dataclasses.replace(request.model, remat=remat),
      )


def candidate(request: Request) -> Candidate:
  """A lower bound of its memory, and its place in the order."""
  state = memory.state_of(request)
  mesh, model, target = request.mesh, request.model, request.target
  shards = target.device_count // mesh.num_model_partitions
  tokens = request.tokens / shards  # of a device and step
  kept = tokens / request.num_microbatches * model.num_layers * model.embed_dim * 4
  least = state.params_bytes + state.optimizer_bytes + kept / mesh.num_model_partitions
  if request.num_microbatches > 1:
    least += state.params_bytes
  products = plan.flops_per_token(model, request.row_length) * request.tokens
  products *= _AGAIN[model.remat] / target.device_count
  seconds = products / target.device.flops / _PRODUCTS
  return Candidate(request, int(least), seconds + _transfers(request, state, tokens))


def _transfers(request: Request, state: memory.State, tokens: float) -> float:
  """Seconds of what the formulas know to be sent."""
  mesh, model, target = request.mesh, request.model, request.target
  parts, data = (
    mesh.num_model_partitions,
    target.device_count // (mesh.num_model_partitions * mesh.num_expert_partitions),
  )
  moved = 0.0
  # Weights are gathered in bfloat16 in every pass of every microbatch.
  whole = state.params_bytes * (data if mesh.fsdp else 1) / 4
  passes = 2 if model.remat is Remat.NONE else 3
  moved += 2 * whole * passes * request.num_microbatches if mesh.fsdp and data > 1 else 0
  moved += 2 * 4 * state.params_bytes / 4 * (data > 1)
  if parts > 1:
    moved += 8 * model.num_layers * tokens * model.embed_dim * 2 * (parts - 1) / parts
  if mesh.num_expert_partitions > 1 and model.moe:
    routed = 4 * len(model.router_layers) * model.moe.top_k * tokens * model.embed_dim * 2 / parts
    moved += routed * max(1, mesh.num_expert_partitions / 8)
  return moved / (target.device.link_rate * max(1, 2 * target.device.links))


def checker(arguments: dict, programme: Programme) -> Callable[[Request], None]:
  """plan.check for other ways to run the same programme."""

  def check(request: Request) -> None:
    run = dataclasses.replace(arguments['run'], num_microbatches=request.num_microbatches)
    mesh = request.target.abstract_mesh(request.mesh)
    plan.check(run, request.model, request.optimizer, programme, None, mesh, request.mesh.fsdp)

  return check


def bindings(request: Request) -> str:
  """Gin bindings that a run takes for it, to paste behind scripts.train."""
  mesh = request.mesh
  return (
    f'--gin.NUM_EXPERT_PARTITIONS={mesh.num_expert_partitions} '
    f'--gin.NUM_MODEL_PARTITIONS={mesh.num_model_partitions} --gin.FSDP={mesh.fsdp} '
    f'--gin.NUM_MICROBATCHES={request.num_microbatches} '
    f'--gin.config.ModelConfig.remat="\'{request.model.remat.value}\'"'
  )
