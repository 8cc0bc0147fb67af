"""The search over meshes: what it leaves out, and what it prints; and the picture."""

import dataclasses

import pytest

from openmoe.config import ConfigError, MeshConfig, Remat
from openmoe.pods import memory, picture, search, step_time
from openmoe.pods.compiler import Compiled
from openmoe.pods.flops import Flops
from openmoe.pods.request import Effort
from openmoe.pods.run import StepPlan
from tests.pods.test_requests import ask

GIB = 2**30


def planned(request) -> StepPlan:
  """A compiler that has room for few pieces, the faster the fewer."""
  fits = request.num_microbatches < 4
  facts = {'overflow': None if fits else {'message': 'no', 'wanted': 1.0, 'limit': 1.0}}
  room = memory.Memory(1 * GIB, 0, 0, GIB, GIB, 3 * GIB if fits else 99 * GIB, 16 * GIB, ())
  seconds = float(request.num_microbatches)
  time = step_time.StepTime(seconds, (0.0, 0.1), 0.1, 0.2, 0.3, seconds, seconds + 1, {})
  counted = Flops(1e15, 0, 0, 0, 0, 0, 1e15, 0, 0)
  one = Compiled(request, facts, '', 1.0, False)
  return StepPlan(request, one, counted, room, (), time if fits else None)


def test_a_search_tries_what_can_run_and_puts_what_fits_first():
  request, notes = ask(mesh=MeshConfig(4), num_microbatches=2), []

  def check(way):
    if way.mesh.num_model_partitions > 1:
      raise ConfigError('no')

  found = search.search(request, check, 5, notes.append, planned)
  assert len(found.plans) == len(notes) == 5
  assert any(step.request == request for step in found.plans), 'the configured one is tried too'
  assert found.impossible > 0
  fits = [step.fits for step in found.plans]
  assert fits == sorted(fits, reverse=True) and fits[0]
  times = [step.time.low for step in found.plans if step.fits]
  assert times == sorted(times)
  everything = len(list(search.ways(request)))
  assert found.impossible + found.pruned + found.left + len(found.plans) == everything


def test_what_cannot_fit_is_not_compiled():
  # In one piece the block inputs of so many rows are 32 GiB a device, in sixteen they are 2.
  request = ask(mesh=MeshConfig(8), batch=2**18, num_microbatches=16, effort=Effort.FULL)
  found = search.search(request, lambda way: None, 3, planned=planned)
  assert found.pruned > 0
  kept = [search.candidate(step.request).least_bytes for step in found.plans]
  assert max(kept) <= request.target.device.hbm_bytes


def test_bindings_say_all_that_a_search_changes():
  request = ask(mesh=MeshConfig(4, 2, True), num_microbatches=8)
  request = dataclasses.replace(request, model=dataclasses.replace(request.model, remat=Remat.DOTS))
  assert search.bindings(request) == (
    '--gin.NUM_EXPERT_PARTITIONS=4 --gin.NUM_MODEL_PARTITIONS=2 --gin.FSDP=True '
    '--gin.NUM_MICROBATCHES=8 --gin.config.ModelConfig.remat="\'dots\'"'
  )


@pytest.mark.parametrize('expert', [1, 4])
def test_more_microbatches_need_less_at_least(expert):
  least = [
    search.candidate(ask(mesh=MeshConfig(expert), batch=4096, num_microbatches=n)).least_bytes
    for n in (2, 4, 8)
  ]
  assert least == sorted(least, reverse=True)


def test_a_picture_is_drawn_of_what_fits_and_what_does_not(tmp_path):
  plans = [planned(ask()), planned(ask(mesh=MeshConfig()))]
  picture.draw(tmp_path / 'plans.png', plans)
  assert (tmp_path / 'plans.png').read_bytes().startswith(b'\x89PNG')
