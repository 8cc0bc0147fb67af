"""The keeper, with commands that end in every way and fakes of gcloud, sbatch, sacct and ssh."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

from openmoe.running import keeper
from openmoe.running.keeper import Keeper, Place, run_dir_of, starts_of
from openmoe.running.places import QueuedTpu, Slurm

ROOT = pathlib.Path(__file__).parent.parent
# What a run does, as far as a keeper sees: appends to its timeline, ends with the next code.
RUN = """
import json, os, pathlib, signal, sys
folder, ends = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
done = folder / 'done'
count = len(done.read_text()) if done.exists() else 0
done.write_text('x' * (count + 1))
first, last, code = ends[count]
with open(folder / 'timeline.jsonl', 'a') as file:
  for kind, step in (('start', 0), ('setup', 0), ('data', first), ('step', first), ('save', last)):
    file.write(json.dumps({'step': step, 'kind': kind, 'time': 0.0}) + '\\n')
if code < 0:
  os.kill(os.getpid(), -code)
sys.exit(code)
"""


def keep(folder, ends, waits=None, **options) -> int:
  """Keeps the fake run, without waiting; the waits it wanted go to `waits`."""
  command = [sys.executable, '-c', RUN, str(folder), json.dumps(ends)]
  place = options.pop('place', Place())
  kept = Keeper(
    command, str(folder), place, str(folder / 'keep.jsonl'), 10.0, 100.0,
    note=options.pop('note', print), sleep=(waits if waits is not None else []).append,
  )  # fmt: skip
  return kept.keep()


@pytest.fixture(autouse=True)
def _own_signals():
  before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def log(folder) -> list[dict]:
  return [json.loads(line) for line in (folder / 'keep.jsonl').read_text().splitlines()]


def starts(folder) -> int:
  return len((folder / 'done').read_text())


def test_stopped_and_killed_runs_are_started_again_until_complete(tmp_path):
  waits = []
  ends = [(0, 10, 75), (10, 17, -9), (15, 20, 137), (20, 30, -11), (25, 40, 69), (40, 50, 0)]
  assert keep(tmp_path, ends, waits) == 0
  *attempts, end = log(tmp_path)
  assert [a['code'] for a in attempts] == [75, 137, 137, 139, 69, 0]
  assert [(a['first'], a['last'], a['lost']) for a in attempts[:2]] == [(0, 10, 0), (10, 17, 0)]
  assert waits == [10.0] * 5  # steps were gained each time
  assert (end['attempts'], end['code'], end['why']) == (6, 0, 'complete')
  assert end['wall'] == pytest.approx(end['productive'] + end['lost'], abs=0.01)


@pytest.mark.parametrize('code', [64, 65, 66, 130])
def test_what_will_not_pass_is_not_tried_again(tmp_path, code):
  assert keep(tmp_path, [(0, 5, code)]) == code
  assert starts(tmp_path) == 1


def test_three_deaths_at_one_step_end_it(tmp_path):
  notes = []
  ends = [(0, 10, -9), (5, 12, -9), (5, 12, -6), (5, 12, 1), (5, 12, 0)]
  assert keep(tmp_path, ends, note=notes.append) == 1
  assert starts(tmp_path) == 4
  assert '3 deaths in a row at step 12' in notes[-1]


def test_deaths_that_gain_steps_go_on(tmp_path):
  ends = [(0, step, -9) for step in range(1, 8)] + [(7, 8, 0)]
  assert keep(tmp_path, ends) == 0
  assert starts(tmp_path) == 8


def test_stops_that_save_are_no_deaths(tmp_path):
  ends = [(5, 5, 75)] * 5 + [(5, 8, 0)]
  assert keep(tmp_path, ends) == 0


def test_the_wait_doubles_while_no_step_is_gained(tmp_path):
  waits = []
  ends = [(5, 5, -9), (5, 5, 75), (5, 5, -9), (5, 5, -9), (5, 5, -9)]
  assert keep(tmp_path, ends, waits) == 137
  assert waits == [20.0, 10.0, 20.0, 40.0]


def test_without_a_timeline_three_deaths_end_it(tmp_path):
  command = [sys.executable, '-c', 'import sys; sys.exit(137)']
  kept = Keeper(command, None, Place(), str(tmp_path / 'log'), sleep=lambda s: None)
  assert kept.keep() == 137
  assert len(kept.attempts) == 3


def test_what_a_killed_start_did_in_vain_is_no_productive_time():
  attempt = keeper.Attempt(0.0, 0.0, seconds=60.0, first=10, last=40, lost=10)
  assert attempt.productive == pytest.approx(40.0)


def test_a_damaged_timeline_is_read_as_far_as_it_goes(tmp_path):
  lines = [
    '{"step": 0, "kind": "start"}', '{"step": 7, "kind": "data"}', '[]', '{"step": "x", "kind": 3}',
    '{"step": 9, "kind": "save"}', '{"step": 5, "kind": "commit"}', '{"st',
  ]  # fmt: skip
  (tmp_path / 'timeline.jsonl').write_text('\n'.join(lines))
  assert starts_of(str(tmp_path)) == [(7, 9)]
  assert starts_of(str(tmp_path / 'none')) == []


def test_the_run_directory_is_found_in_the_command(monkeypatch):
  monkeypatch.setenv('MODEL_DIR', 'runs/a')
  assert run_dir_of(['bash', 'x.sh']) == 'runs/a'
  assert run_dir_of(['x', "--gin.MODEL_DIR='runs/b'", '--gin.SEED=1']) == 'runs/b'


# --- the script, as a person starts it


def script(*arguments, **options) -> subprocess.Popen:
  return subprocess.Popen(
    ['bash', str(ROOT / 'scripts/keep.sh'), *map(str, arguments)],
    env=os.environ | {'OPENMOE_VENV': str(pathlib.Path(sys.executable).parents[1])},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
  )  # fmt: skip


def test_the_script_keeps_a_command_and_passes_its_code_on(tmp_path):
  ends = json.dumps([(0, 4, 137), (4, 9, 65)])
  done = script(
    f'--run_dir={tmp_path}', '--wait=0.01', '--', sys.executable, '-c', RUN, tmp_path, ends
  )
  output, _ = done.communicate(timeout=120)
  assert done.returncode == 65, output
  assert 'ended with 137 at step 4; again' in output
  assert 'data are damaged, or training has diverged (65) after 2 starts' in output
  assert [line['kind'] for line in log(tmp_path)] == ['attempt', 'attempt', 'end']


def test_a_signal_to_the_script_reaches_the_run_and_ends_both(tmp_path):
  code = (
    'import signal, sys, time, pathlib\n'
    'signal.signal(signal.SIGTERM, lambda *a: sys.exit(75))\n'
    f'pathlib.Path({str(tmp_path / "up")!r}).write_text("1")\n'
    'time.sleep(100)\n'
  )
  running = script(f'--run_dir={tmp_path}', '--', sys.executable, '-c', code)
  until = time.monotonic() + 60
  while not (tmp_path / 'up').exists() and time.monotonic() < until:
    time.sleep(0.05)
  running.send_signal(signal.SIGTERM)
  output, _ = running.communicate(timeout=60)
  assert running.returncode == 75, output
  assert 'asked to stop (75) after 1 start' in output


def test_a_command_that_is_not_there_is_refused(tmp_path):
  done = script(f'--run_dir={tmp_path}', '--', 'no-such-command')
  output, _ = done.communicate(timeout=60)
  assert done.returncode == 64
  assert 'no-such-command: No such file' in output
  done = script('--tpu=a', '--', 'x')
  assert '--zone' in done.communicate(timeout=60)[0]
  assert done.returncode == 64


# --- fakes of other people's commands


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Puts a command in the way: name, shell text; its calls are added to tmp_path/NAME.calls."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')

  def put(name: str, text: str) -> pathlib.Path:
    calls = tmp_path / f'{name}.calls'
    calls.touch()
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "$*" >> {calls}\nn=$(wc -l < {calls})\n{text}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return calls

  return put


STATES = """
case "$*" in
  *describe*)
    i=$(grep -c describe {calls})
    state=$(echo "{states}" | cut -d' ' -f"$i")
    [[ "$state" == NONE ]] && exit 1
    echo "$state" ;;
  *ssh*)
    i=$(grep -c ssh {calls})
    echo working; echo "keep:exit=$(echo "{codes}" | cut -d' ' -f"$i")"; exit 1 ;;
esac
"""


def tpu(fake, tmp_path, states, codes):
  calls = tmp_path / 'gcloud.calls'
  text = STATES.format(calls=calls, states=states, codes=codes)
  fake('gcloud', text)
  place = QueuedTpu('pod', 'us-a', 'v4-32', 'base', ['--spot'], sleep=lambda s: None)
  kept = Keeper(
    ['train', 'a b'], 'gs://bucket/run', place, str(tmp_path / 'log'), sleep=lambda s: None
  )
  return kept, calls


def test_a_queued_tpu_is_made_waited_for_and_made_anew_when_it_was_taken(fake, tmp_path, capfd):
  # Not there, in the queue, there; ssh ends as the node is suspended; anew; there, complete.
  states = 'NONE WAITING_FOR_RESOURCES ACTIVE SUSPENDED SUSPENDED ACTIVE ACTIVE'
  kept, calls = tpu(fake, tmp_path, states, '137 0')
  assert kept.keep() == 0
  assert [a.code for a in kept.attempts] == [255, 0]
  said = [line.split(' storage ')[0] for line in calls.read_text().splitlines()]
  made = 'compute tpus queued-resources create pod --node-id=pod --accelerator-type=v4-32'
  assert [line.startswith(made) for line in said].count(True) == 2
  assert all('--zone=us-a' in line for line in said if line.startswith('compute'))
  assert sum('delete pod --force --quiet' in line for line in said) == 1
  assert any("--worker=all --command=train 'a b'; echo keep:exit=$?" in line for line in said)
  output = capfd.readouterr().out
  assert 'working' in output
  assert 'waiting_for_resources' in output


@pytest.mark.parametrize(('codes', 'expected'), [('64', [64]), ('75 65', [75, 65])])
def test_codes_of_the_workers_come_through_ssh(fake, tmp_path, codes, expected):
  kept, _ = tpu(fake, tmp_path, ' '.join(['ACTIVE'] * 9), codes)
  assert kept.keep() == expected[-1]
  assert [a.code for a in kept.attempts] == expected


def slurm(fake, tmp_path, states):
  calls = fake('sacct', f'echo "{states}" | cut -d" " -f"$n"')
  submitted = fake('sbatch', 'echo "$((40 + n));cluster"')
  kept = Keeper(
    ['train', 'a b'], str(tmp_path / 'run'), Slurm(['--nodes=4'], sleep=lambda s: None),
    str(tmp_path / 'log'), sleep=lambda s: None,
  )  # fmt: skip
  return kept, submitted, calls


def test_a_job_that_is_preempted_or_out_of_time_is_submitted_again(fake, tmp_path):
  states = 'PENDING|0:0 RUNNING|0:0 PREEMPTED|0:15 NODE_FAIL|0:0 RUNNING|0:0 FAILED|75:0'
  states += ' COMPLETED|0:0'
  kept, submitted, calls = slurm(fake, tmp_path, states)
  assert kept.keep() == 0
  assert [a.code for a in kept.attempts] == [255, 255, 75, 0]
  expected = "--parsable --signal=TERM@120 --nodes=4 --wrap=srun --kill-on-bad-exit=1 train 'a b'"
  assert submitted.read_text().splitlines() == [expected] * 4
  jobs = [line.split()[1] for line in calls.read_text().splitlines()]
  assert jobs == ['41', '41', '41', '42', '43', '43', '44']


@pytest.mark.parametrize(
  ('state', 'code'), [('FAILED|64:0', 64), ('FAILED|65:0', 65), ('CANCELLED|0:15', 130)]
)
def test_a_job_that_is_refused_or_cancelled_is_not(fake, tmp_path, state, code):
  kept, submitted, _ = slurm(fake, tmp_path, state)
  assert kept.keep() == code
  assert len(submitted.read_text().splitlines()) == 1


def test_a_signal_reaches_the_job(fake, tmp_path):
  cancelled = fake('scancel', '')
  fake('sbatch', 'echo 41')
  fake('sacct', 'echo "FAILED|75:0"')
  place = Slurm(sleep=lambda s: place.stop())
  assert place.run(['train']) == 75
  assert cancelled.read_text() == '--signal=TERM --full 41\n'
