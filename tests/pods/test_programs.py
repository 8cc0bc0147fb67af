"""What is read out of a compiled program, against a small one that is counted by hand."""

import gzip
import math
import pathlib

import pytest

from openmoe.observe import hardware
from openmoe.pods import collectives, hlo, links, memory, step_time
from tests.pods.small import LOOPS

GOLDEN = pathlib.Path(__file__).parent.parent / 'golden' / 'tpu_program.txt.gz'
MESH = [('data', 2), ('expert', 2), ('model', 2)]
# Four chips a host, the first half on the one.
HOSTS = [(0, place // 4) for place in range(8)]


@pytest.fixture(scope='module')
def module():
  return hlo.parse(gzip.decompress(GOLDEN.read_bytes()).decode())


def test_bytes_of_every_axis_are_those_counted_by_hand(module):
  found = {(c.kind, c.axes): c for c in collectives.find(module, MESH, HOSTS)}
  assert set(found) == {
    ('all-gather', 'data'),
    ('all-reduce', 'model'),
    ('all-to-all', 'expert'),
    ('all-reduce', 'data+expert+model'),
  }
  gather, total = found['all-gather', 'data'], found['all-reduce', 'data+expert+model']
  reduce, exchange = found['all-reduce', 'model'], found['all-to-all', 'expert']
  assert (gather.count, reduce.count, exchange.count, total.count) == (LOOPS, LOOPS, LOOPS, 1)
  assert gather.array_bytes == LOOPS * 256 * 512 * 2
  assert gather.wire_bytes == gather.array_bytes / 2
  assert reduce.array_bytes == LOOPS * 64 * 512 * 4
  assert reduce.wire_bytes == reduce.array_bytes  # twice a half
  assert exchange.array_bytes == LOOPS * 8 * 128 * 4
  assert exchange.wire_bytes == exchange.array_bytes / 2
  assert (total.array_bytes, total.wire_bytes) == (4, 2 * 4 * 7 / 8)
  assert gather.reach == total.reach == 'hosts'
  assert reduce.reach == exchange.reach == 'host'


def test_groups_in_every_form_that_is_printed():
  of = lambda text, devices=8: collectives.groups(f'replica_groups={text}, x=1', devices)
  assert of("mesh['a'=2,'b'=2,'c'=2] {'b'}") == [[0, 2], [1, 3], [4, 6], [5, 7]]
  assert of("mesh['a'=2,'b'=4] {'b':(2)2}") == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert of("mesh['a'=4,'b'=2] {'a','b'}") == [[0, 1, 2, 3, 4, 5, 6, 7]]
  assert of('[4,2]<=[8]') == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert of('[4,2]<=[2,4]T(1,0)') == [[0, 4], [1, 5], [2, 6], [3, 7]]
  assert of('{{0,3},{1,2}}') == [[0, 3], [1, 2]]
  assert of('{}', 2) == [[0, 1]]
  assert collectives.groups('source_target_pairs={{0,1},{1,0}}', 2) == [[0, 1], [1, 0]]


def test_a_group_lies_along_the_axes_in_which_its_devices_differ():
  assert collectives.axes_of([0, 4], MESH) == 'data'
  assert collectives.axes_of([0, 3], MESH) == 'expert+model'
  assert collectives.axes_of([5], MESH) == ''


@pytest.mark.parametrize(
  ('condition', 'trips'),
  [
    ('%c = s32[] constant(7)\n  ROOT %lt = pred[] compare(%i, %c), direction=LT', 7),
    ('ROOT %lt = pred[] compare(%i, %i), direction=LT', None),
  ],
)
def test_trips_of_a_loop_are_read_off_its_condition(condition, trips):
  text = f"""HloModule m

%body (p: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  ROOT %all-reduce.1 = s32[] all-reduce(%p), replica_groups={{{{0,1}}}}, to_apply=%add
}}

%condition (p.1: s32[]) -> pred[] {{
  %i = s32[] parameter(0)
  {condition}
}}

ENTRY %main (a: s32[]) -> s32[] {{
  %a = s32[] parameter(0)
  ROOT %while.1 = s32[] while(%a), condition=%condition, body=%body
}}
"""
  module = hlo.parse(text)
  loop = module.computations['main'][-1]
  assert hlo.trips(module, loop) == trips
  (one,) = collectives.find(module, [('model', 2)], [(0, 0), (0, 0)])
  assert one.count == (trips or 1)


def test_what_has_no_entry_is_no_program():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.parse('HloModule nothing')


def test_memory_follows_the_order_of_the_program():
  text = """HloModule m

ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %b = f32[1024]{0} broadcast(%a), metadata={op_name="jvp(x)"}
  %c = f32[512]{0} slice(%b)
  %d = f32[512]{0} negate(%c)
  ROOT %e = f32[256]{0} slice(%d)
}
"""
  kept, largest = memory.follow(hlo.parse(text))
  assert kept == 0
  # b and c are in use together, beside the argument.
  assert [b.bytes for b in largest] == [4096, 2048, 1024]


CUBE = links.Torus(
  [[x, y, z, 0] for x in range(4) for y in range(8) for z in range(8)], [(0, 0)] * 256, (4, 8, 8)
)


def _moved(kind: str, group: tuple[int, ...], size: float) -> collectives.Collective:
  return collectives.Collective(
    kind, 'model', len(group), 1, int(size), size, 'hosts', False, group, ''
  )


def test_links_of_a_torus():
  v5p = hardware.device('TPU v5')
  ring = tuple(range(8))  # one side of 8, which closes
  seconds = lambda *args: links.seconds(_moved(*args), CUBE, v5p)
  assert seconds('all-gather', ring, 200e9) == pytest.approx(1.0, rel=1e-4)
  plane = tuple(range(64))  # two sides: twice the links
  assert seconds('all-gather', plane, 200e9) == pytest.approx(0.5, rel=1e-4)
  half = tuple(range(4))  # does not close: one direction
  assert seconds('all-gather', half, 200e9) == pytest.approx(2.0, rel=1e-4)
  apart = (0, 2, 4, 6)  # shares its links with another group
  assert seconds('all-gather', apart, 200e9) == pytest.approx(2.0, rel=1e-4)
  assert seconds('all-to-all', ring, 100e9) == pytest.approx(1.0, rel=1e-4)
  assert seconds('collective-permute', (0, 7), 100e9) == pytest.approx(1.0, rel=1e-4)  # around


def test_transfers_between_slices_take_the_network():
  far = _moved('all-reduce', (0, 1), 6.25e9)
  far = collectives.dataclasses.replace(far, reach='slices')
  assert links.seconds(far, CUBE, hardware.device('TPU v5')) == pytest.approx(1.0, rel=1e-3)
  unknown = links.seconds(far, CUBE, hardware.device('TPU v2'))
  assert math.isinf(unknown)


def test_cycles_of_fusions_count_with_their_loops(module):
  cycles = step_time._cycles(module)
  assert sum(cycles.values()) > 0
  once = sum(
    int(found.group(1))
    for lines in module.computations.values()
    for one in lines
    if one.opcode == 'fusion' and (found := step_time._CYCLES.search(one.rest))
  )
  assert sum(cycles.values()) > once * 1.5  # three times for what is in the loop
