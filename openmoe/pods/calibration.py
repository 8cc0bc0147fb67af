"""Predictions held against published runs: the same method, their sizes, their machines."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from openmoe.pods import flops, step_time
from openmoe.pods.published import RUNS, Published
from openmoe.pods.request import Effort, Request
from openmoe.pods.run import StepPlan, plan_step


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One published run beside what is predicted.

  Attributes:
    published: share of the peak, by the FLOPs that this project counts: causal attention once.
    low, high: predicted range of the same, None where our step does not fit.
    fused: the upper end if attention's products ran at the rate of all others and its softmax cost
      nothing, as in a fused kernel; published runs have one.
  """

  run: Published
  step: StepPlan
  published: float
  low: float | None
  high: float | None
  fused: float | None


def compare(
  effort: Effort,
  runs: Sequence[Published] = RUNS,
  planned: Callable[[Request], StepPlan] = plan_step,
) -> list[Comparison]:
  """Every published run with what is predicted for it."""
  return [_one(run, planned(dataclasses.replace(run.request, effort=effort))) for run in runs]


def _one(run: Published, step: StepPlan) -> Comparison:
  counted, below = step.flops, flops.attention_flops(step.request)
  # Until July 2025 MaxText counted attention whole: as much above the diagonal as below.
  share = counted.model / (counted.model + below) if run.full_attention else 1.0
  published = run.utilisation * share
  if step.time is None:
    return Comparison(run, step, published, None, None, None)
  time, target = step.time, step.request.target
  core = time.parts.get('attention core', 0.0)
  # Forward, backward and forward again: four passes where the model counts three.
  products = (below + counted.attention) * 4 / 3
  products /= target.device_count * target.device.flops * step_time.BEST_SHARE
  without = max(0.0, core - products) if step.request.effort is Effort.FULL else 0.0
  return Comparison(
    run,
    step,
    published,
    step.utilisation(time.high),
    step.utilisation(time.low),
    step.utilisation(time.low - without),
  )


def correction(found: Sequence[Comparison]) -> float | None:
  """Median of published over predicted, at the upper end with a fused kernel; None without any."""
  ratios = [one.published / one.fused for one in found if one.fused]
  return statistics.median(ratios) if ratios else None
