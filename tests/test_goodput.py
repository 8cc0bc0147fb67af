"""The wall time of a run is divided into parts that add up, whatever happened to it."""

import json
import random

import pytest

from openmoe.observe.goodput import PARTS, divide, read_goodput
from openmoe.observe.timeline import NAME


def lines(*rows) -> list[dict]:
  return [
    {'time': float(time), 'kind': kind, 'step': step} | (more[0] if more else {})
    for time, kind, step, *more in rows
  ]


WHOLE = lines(
  (10, 'start', 0, {'seconds': 4.0}),
  (10, 'setup', 0),
  (12, 'data', 0),
  (15, 'restore', 0),
  (16, 'data', 0),
  (18, 'step', 0),
  (19, 'compile', 0),
  (30, 'step', 0),
  (50, 'save', 10, {'stalled': 5.0}),
  (52, 'step', 10),
  (53, 'commit', 10),
  (72, 'evaluation', 20),
  (80, 'step', 20),
  (81, 'end', 20),
)


def test_a_run_without_kills():
  found = divide(WHOLE)
  assert found.wall == 81 - 6
  assert {k: v for k, v in found.seconds.items() if v} == {
    'setup': 4 + 2, 'data': 3 + 2, 'restore': 1, 'compile': 11, 'save': 2, 'evaluation': 8,
    'step': 1 + 15 + 20 + 1, 'stalled': 5,
  }  # fmt: skip
  assert found.goodput == pytest.approx(37 / 75)
  (start,) = found.starts
  assert (start.first, start.last, start.ended, start.redone) == (0, 20, True, 0)


def test_steps_after_the_last_checkpoint_of_a_kill_are_redone():
  killed = WHOLE[:-3] + lines(
    (74, 'evaluation', 21),  # 20 done at 72, saved at 10; then killed without a word
    (100, 'start', 0, {'seconds': 3.0}),
    (101, 'data', 10),
    (102, 'step', 10),
    (122, 'end', 20),
  )
  found = divide(killed)
  assert found.wall == 122 - 6
  first, second = found.starts
  assert (first.ended, first.redone, second.first) == (False, 11, 10)
  # From 52 on, when step 10 was done: 20 s of steps, then 2 s of evaluation.
  assert found.seconds['redone'] == 22
  assert found.seconds['lost'] == 97 - 74
  assert found.seconds['step'] == 1 + 15 + 20
  assert found.seconds['down'] == 0


def test_a_stretch_of_steps_that_was_saved_in_its_middle_is_shared_out():
  found = divide(
    lines(
      (0, 'start', 0),
      (0, 'data', 0),
      (0, 'step', 0),
      (40, 'evaluation', 40),
      (50, 'start', 0),
      (50, 'data', 30),
      (50, 'step', 30),
      (60, 'end', 40),
    )
  )
  assert found.seconds['redone'] == 10
  assert found.seconds['step'] == 30 + 10
  assert found.seconds['lost'] == 10


def test_a_stop_loses_nothing():
  found = divide(
    WHOLE + lines((90, 'start', 0), (91, 'data', 20), (92, 'step', 20), (99, 'end', 27))
  )
  assert found.seconds['down'] == 9
  assert found.seconds['redone'] == found.seconds['lost'] == 0
  assert found.wall == 99 - 6


def test_the_parts_add_up_for_any_history():
  rng = random.Random(0)
  kinds = [k for k in PARTS if k not in ('redone', 'lost', 'down', 'stalled')] + ['commit']
  for _ in range(200):
    time, step, rows = 100.0, 0, []
    for _ in range(rng.randrange(1, 5)):
      saved = rng.randrange(0, step + 1)
      time += rng.random() * 9
      begin = rng.random() * 3
      rows.append({'time': time + begin, 'kind': 'start', 'step': 0, 'seconds': begin})
      time, step = time + begin, saved
      for _ in range(rng.randrange(0, 12)):
        time += rng.random() * 9
        step += rng.randrange(0, 7)
        rows.append(
          {'time': time, 'kind': rng.choice(kinds), 'step': step, 'stalled': rng.random()}
        )
      if rng.random() < 0.5:
        rows.append({'time': time, 'kind': 'end', 'step': step})
    found = divide(rows)
    first, last = rows[0]['time'] - rows[0]['seconds'], rows[-1]['time']
    assert found.wall == pytest.approx(last - first)
    assert min(found.seconds.values()) >= 0


def test_a_timeline_that_was_cut_or_is_odd_is_read_as_far_as_it_goes(tmp_path):
  assert read_goodput(tmp_path).wall == 0
  odd = [{'step': 1, 'kind': 7, 'time': 1}, {'step': 1, 'kind': 'step', 'time': 'x'}, {'step': 1}]
  text = '\n'.join(json.dumps(line) for line in [*WHOLE, *odd])
  (tmp_path / NAME).write_text(text + '\n{"step": 3, "ki')
  assert read_goodput(tmp_path).wall == 75
  assert read_goodput(tmp_path).goodput == divide(WHOLE).goodput
