"""What is asked of the compiler, what is known before, and what it says when it refuses."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from openmoe.checkpoint import fields
from openmoe.config import ConfigError, Dispatch, MeshConfig, OptimizerConfig, Remat
from openmoe.models.sizes import SIZES
from openmoe.pods import compiler, flops, memory, run
from openmoe.pods.request import Effort, Request
from openmoe.pods.target import Target
from openmoe.pods.worker import _overflow

TINY = dataclasses.replace(SIZES['openmoe_tiny'], remat=Remat.FULL)
GROUP = {'group_size': 512}


def ask(topology='v5e:2x4', mesh=MeshConfig(fsdp=True), batch=64, **fields) -> Request:
  model = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, **GROUP))
  given = {'model': model, 'optimizer': OptimizerConfig(), 'num_microbatches': 1}
  return Request(
    **(given | {'mesh': mesh, 'batch_size': batch, 'row_length': 512} | fields),
    target=Target(topology),
  )


def test_a_request_survives_its_file():
  request = ask(mesh=MeshConfig(4, 2, True), effort=Effort.FULL, guarded=True)
  text = json.dumps(fields.plain(request))
  assert fields.read(Request, json.loads(text), 'request.json') == request


def test_a_digest_is_of_what_shapes_the_step():
  one = ask()
  assert one.digest == ask().digest
  other = [ask('v5p:2x2x2'), ask(batch=128), ask(mesh=MeshConfig()), ask(num_microbatches=2)]
  other += [ask(effort=Effort.FULL), ask(guarded=True)]
  assert len({one.digest, *(r.digest for r in other)}) == 7
  renamed = dataclasses.replace(one, model=dataclasses.replace(one.model, name='other'))
  assert renamed.digest == one.digest


@pytest.mark.parametrize(
  ('name', 'rule'),
  [
    ('v9:4x4', 'names no known machine'),
    ('v5q:4x4x4', "Did you mean 'v5"),
    ('v5p', 'needs its size'),
    ('v5p:4x0x4', 'needs its size'),
    ('v5p:4x4', 'has 3 sides'),
    ('v5e:4x4x4', 'has 2 sides'),
  ],
)
def test_a_machine_that_is_none_is_refused(name, rule):
  with pytest.raises(ConfigError, match=rule):
    Target(name)


def test_machines():
  assert Target('v4:4x8x8').device_count == 256
  assert Target('ironwood:4x4x4').device_count == 128  # two devices a chip
  assert Target('v5e:16x16', slices=2).device_count == 512
  gpu = Target('h100:32x8')
  assert (gpu.topology, gpu.kind, gpu.device_count) == ('H100:32x8', 'NVIDIA H100', 256)
  with pytest.raises(ConfigError, match='more nodes'):
    Target('H100:32x8', slices=2)


@pytest.mark.parametrize('parts', [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (1, 2)], ids=str)
@pytest.mark.parametrize('fsdp', [False, True])
def test_more_devices_never_hold_more_each(parts, fsdp):
  """Of the same partitions, and so of more data partitions; and of more partitions."""
  sizes = ['v5e:2x4', 'v5e:4x4', 'v5e:8x8']
  held = []
  for name in sizes:
    state = memory.state_of(ask(name, MeshConfig(*parts, fsdp), batch=1024))
    held.append(state.params_bytes + state.optimizer_bytes)
  assert held == sorted(held, reverse=True)
  whole = memory.state_of(ask(sizes[0], MeshConfig(), batch=1024))
  assert held[0] <= whole.params_bytes + whole.optimizer_bytes


# Arguments of steps as libtpu 0.0.42.1 counted them, their padding included, and rows of the batch.
@pytest.mark.parametrize(
  ('model', 'topology', 'mesh', 'batch', 'counted'),
  [
    ('openmoe_8b', 'v5p:4x8x8', MeshConfig(32, 8), 1024, 1772962816),
    ('openmoe_8b', 'v5p:4x8x8', MeshConfig(32, 1, True), 1024, 1774183424),
    ('openmoe_tiny', 'v5e:2x4', MeshConfig(4, 1, True), 32, 3810304),
  ],
)
def test_state_is_what_the_compiler_counts(model, topology, mesh, batch, counted):
  length = 512 if model == 'openmoe_tiny' else 2048
  request = ask(topology, mesh, batch, model=SIZES[model], row_length=length)
  state = memory.state_of(request)
  rows = batch // (request.target.device_count // mesh.num_model_partitions)
  # Four fields of the batch are read: rows of OpenMoE count their positions themselves.
  exact = state.params_bytes + state.optimizer_bytes + 4 * 4 * rows * length
  assert exact <= counted <= exact + 65536  # scalars, and vectors padded to a tile


@pytest.mark.parametrize('name', ['openmoe_tiny', 'jetmoe_tiny'])
def test_flops_add_up_by_purpose(name):
  model = SIZES[name]
  model = dataclasses.replace(model, remat=Remat.FULL, moe=dataclasses.replace(model.moe, **GROUP))
  counted = flops.count(ask(mesh=MeshConfig(4), model=model, num_microbatches=2))
  assert counted.unknown_loops == 0
  assert abs(counted.other) < 0.01 * counted.model
  # Four blocks of 128 queries reach 10 of 16 squares, and 8 are below the diagonal.
  below = 3.0 * 64 * 512 * model.num_layers * 2 * 512 * model.num_heads * model.head_dim
  slots = model.moe.top_k if name == 'jetmoe_tiny' else 1
  # Of a query that sees nothing: keys with values, that with queries, and their gradients.
  blind = 2.0 * 64 * 512 * model.num_layers * model.num_heads * model.head_dim**2 * (2 + 3 * slots)
  assert counted.attention == pytest.approx(below * slots * (10 / 8 - 1) + blind)
  if name == 'jetmoe_tiny':
    assert counted.capacity == pytest.approx(0)
    assert 0 < counted.kernels < counted.executed
  else:
    room = min(1.25 / 2, 1)  # the released factor does not count top_k
    each = 3.0 * 64 * 512 * 2 * 4 * model.embed_dim * model.mlp_dim * 2 * model.num_sparse_layers
    assert counted.capacity == pytest.approx(each * (room - 1))
  assert counted.recomputed > 0.2 * counted.model


def test_masks_are_dispatch_and_kept_activations_are_not_computed_again():
  moe = dataclasses.replace(TINY.moe, **GROUP, dispatch=Dispatch.MASK)
  masks = flops.count(ask(model=dataclasses.replace(TINY, moe=moe, remat=Remat.NONE)))
  assert masks.dispatch > 0
  logits = 2.0 * 64 * 512 * TINY.embed_dim * TINY.vocab_size
  reached = 10 / 16 * 512  # keys a query meets in its block
  blocks = 2.0 * 64 * 512 * reached * TINY.num_heads * TINY.head_dim * TINY.num_layers
  assert masks.recomputed == pytest.approx(logits + blocks)  # the loss's own, and attention's


REFUSED = (
  'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
  '(36.43G) exceeds available HBM (15.75G).'
)


def test_a_refusal_for_memory_comes_with_its_remedy():
  request = ask(mesh=MeshConfig(4), batch=4096)
  one = compiler.Compiled(request, {'overflow': _overflow(REFUSED)}, '', 1.0, False)
  room = memory.measure(one)
  assert room.limit == pytest.approx(15.75 * 2**30)
  assert room.peak == pytest.approx(36.43 * 2**30 + room.parameters + room.optimizer, rel=1e-6)
  said = run.remedies(run.StepPlan(request, one, None, room))
  assert any('--gin.NUM_MICROBATCHES=4' in remedy for remedy in said), said
  with pytest.raises(ConfigError, match='UNIMPLEMENTED'):
    _overflow('UNIMPLEMENTED: something else')


def test_without_libtpu_it_says_how_to_get_it(monkeypatch, tmp_path):
  monkeypatch.setenv(compiler.LIBRARY, str(tmp_path / 'libtpu.so'))
  with pytest.raises(ConfigError, match='pip install --no-deps --target .*unset TPU_LIBRARY_PATH'):
    compiler.compiled(ask(), tmp_path / 'cache')
  assert not list(tmp_path.glob('cache/*'))


@pytest.mark.slow
def test_the_command_refuses_in_one_line(tmp_path):
  files = ('models/openmoe_tiny', 'runs/pretrain', 'experiments/demo')
  command = [sys.executable, '-m', 'scripts.plan', *(f'--gin_file=gin/{f}.gin' for f in files)]
  environment = os.environ | {compiler.LIBRARY: str(tmp_path / 'none.so')}
  environment['XDG_CACHE_HOME'] = str(tmp_path)
  done = subprocess.run(
    [*command, '--topology=v5e:2x4'], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 64, done.stderr
  (line,) = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert 'there is no libtpu' in line
