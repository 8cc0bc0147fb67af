"""Published runs: sizes that are theirs, and how a prediction is held against them."""

import pytest

from openmoe.models import abstract_params
from openmoe.plan import count_params
from openmoe.pods import calibration, memory, step_time
from openmoe.pods.compiler import Compiled
from openmoe.pods.flops import Flops
from openmoe.pods.published import RUNS
from openmoe.pods.request import Effort
from openmoe.pods.run import StepPlan


def test_sizes_are_the_published_ones():
  total = {
    run.request.model.name: count_params(abstract_params(run.request.model)[0]) for run in RUNS
  }
  assert total['16b'] == pytest.approx(16e9, rel=0.03)
  assert total['32b'] == pytest.approx(32e9, rel=0.03)
  # Eight experts of Mixtral's 46.7 billion, one that all share, and keys and values of every head.
  shared = 32 * 4 * 4096 * 10752
  assert total['mixtral_8x7b'] - shared == pytest.approx(46.7e9, rel=0.03)


def test_a_prediction_is_held_against_the_same_flops():
  run = next(run for run in RUNS if run.full_attention)
  request, sizes = run.request, run.request.model
  # Three passes of two products, half of each below the diagonal.
  below = 3 * 2 * request.tokens * request.row_length * sizes.num_heads * sizes.head_dim
  below, above = below * sizes.num_layers, below * sizes.num_layers / 4
  a_second = request.target.device_count * request.target.device.flops

  def planned(request):
    target = request.target
    model = target.device_count * target.device.flops  # a second at the peak
    counted = Flops(model, model / 3, 0, 0, above, 0, 0, 0, 0)
    time = step_time.StepTime(2.0, (0, 0), 0.1, 0, 0, 2.0, 4.0, {'attention core': 1.2})
    room = memory.Memory(1, 0, 0, 0, 0, 1, 2, ())
    return StepPlan(
      request, Compiled(request, {'overflow': None}, '', 1, False), counted, room, (), time
    )

  (one,) = calibration.compare(Effort.FULL, [run], planned)
  assert one.published == pytest.approx(run.utilisation / (1 + below / a_second))
  assert (one.low, one.high) == (pytest.approx(0.25), pytest.approx(0.5))
  # What is left of 1.2 s beside the products, four passes of them where three are counted, at 90 %.
  products = (below + above) * 4 / 3 / 0.9 / a_second
  assert 0.01 < products < 1.0
  assert one.fused == pytest.approx(1 / (2.0 - (1.2 - products)))
  assert calibration.correction([one]) == pytest.approx(one.published / one.fused)
