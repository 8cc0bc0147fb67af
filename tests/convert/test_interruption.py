"""A conversion that is killed is taken up again, and ends as if nothing had happened."""

import random
import time

import pytest
from etils import epath

from convert import workplace
from convert.core.tensors import ConvertError
from convert.run import Options, convert, find_form
from tests.convert import case


class Killed(BaseException):
  """Stands for the end of the process: nothing after it runs, no handler catches it."""


@pytest.mark.parametrize(
  ('source', 'target'), [('ours', 'hf'), ('ours', 't5x'), ('jetmoe', 'jetmoe_hf')]
)
@pytest.mark.parametrize('moved', [0, 1, 25, 49])
def test_an_interrupted_export_does_the_rest_and_equals_an_undisturbed_one(
  moved, source, target, tmp_path, monkeypatch, request
):
  ours, whole = request.getfixturevalue(source), request.getfixturevalue(target)
  kind = 't5x' if target == 't5x' else 'hf'
  out = tmp_path / whole.name if kind == 'hf' else tmp_path / 'run' / whole.name
  total = len(find_form(whole).receipt()['tensors'])
  done = []

  def until_killed(job):
    if len(done) >= moved:
      raise Killed
    done.append(job.name)
    return real(job)

  real = workplace.move
  monkeypatch.setattr(workplace, 'move', until_killed)
  monkeypatch.setattr(workplace, 'THREADS', 1)
  if moved < total:
    with pytest.raises(Killed):
      convert(find_form(ours), kind, out, None, Options())
    assert not out.exists()
  again = []
  monkeypatch.setattr(workplace, 'move', lambda job: again.append(job.name) or real(job))
  convert(find_form(ours), kind, out, None, Options())
  if moved < total:
    assert not set(done) & set(again), 'what was there was not done twice'
  assert case.contents(out) == case.contents(whole)
  assert [p.name for p in out.parent.iterdir()] == [out.name], 'nothing is left beside it'


def test_what_another_conversion_left_is_not_mixed_in(ours, hf, tmp_path, monkeypatch):
  real, done = workplace.move, []

  def some(job):
    done.append(job)
    return real(job) if len(done) < 20 else pytest.fail('stop')

  monkeypatch.setattr(workplace, 'move', some)
  with pytest.raises(pytest.fail.Exception):
    convert(find_form(ours), 'hf', tmp_path / 'hf', None, Options(dtype='bfloat16'))
  monkeypatch.setattr(workplace, 'move', real)
  convert(find_form(ours), 'hf', tmp_path / 'hf', None, Options())
  assert case.contents(tmp_path / 'hf') == case.contents(hf)


def test_damage_done_in_between_is_done_again(ours, hf, tmp_path, monkeypatch):
  real, lines = workplace.move, []

  def some(job):
    if len(lines) == 30:
      raise Killed
    lines.append(job.name)
    return real(job)

  monkeypatch.setattr(workplace, 'move', some)
  monkeypatch.setattr(workplace, 'THREADS', 1)
  with pytest.raises(Killed):
    convert(find_form(ours), 'hf', tmp_path / 'hf', None, Options())
  case.edit_tensor(tmp_path / 'hf.partial', lines[3], lambda x: x * 0)
  monkeypatch.setattr(workplace, 'move', real)
  convert(find_form(ours), 'hf', tmp_path / 'hf', None, Options())
  assert case.contents(tmp_path / 'hf') == case.contents(hf)


@pytest.mark.parametrize(
  'line', [b'\xff\xfe\n', b'{"target": ["a"], "sha256_after": 3}\n', b'[1]\n', b'[' * 9999 + b'\n']
)
def test_a_damaged_journal_costs_no_more_than_work(line, ours, hf, tmp_path):
  work = workplace.Workplace(epath.Path(tmp_path / 'hf'), {})
  kept = work._journal_path.read_bytes()
  work.close()
  for content in (line, kept + line):
    work._journal_path.write_bytes(content)
    again = workplace.Workplace(epath.Path(tmp_path / 'hf'), {})
    assert not again._done
    again.close()


def test_a_second_process_on_the_same_output_is_refused(ours, tmp_path):
  work = workplace.Workplace(epath.Path(tmp_path / 'hf'), {})
  with pytest.raises(ConvertError, match='Another process is converting'):
    convert(find_form(ours), 'hf', tmp_path / 'hf', None, Options())
  work.close()


@pytest.mark.slow
def test_kill_minus_nine_at_ten_random_moments(ours, tmp_path):
  arguments = ('export', '--to', 'hf', '--max_shard', '40KB', ours)
  began = time.monotonic()
  assert case.start_cli(*arguments, tmp_path / 'whole').wait() == 0
  length = time.monotonic() - began
  whole = case.contents(tmp_path / 'whole')
  moments = random.Random(0)
  for i in range(10):
    out = tmp_path / f'killed_{i}'
    process = case.start_cli(*arguments, out)
    # Interpreter and libraries take most of so small a run: aim at the part that converts.
    time.sleep(length * moments.uniform(0.4, 1.0))
    process.kill()
    process.wait()
    assert not out.exists() or case.contents(out) == whole, 'only what is complete has the name'
    process = case.start_cli(*arguments, out)
    text = process.communicate()[0].decode()
    assert process.returncode == 0, text
    assert case.contents(out) == whole
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(('.killed', f'killed_{i}.'))]
