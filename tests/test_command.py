"""What surrounds every command: exit codes, errors in one line, streams that are closed or full."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from convert.core.names import NamesError
from convert.core.tensors import ConvertError
from openmoe.checkpoint.checkpointer import CheckpointError
from openmoe.checkpoint.paths import Unreadable
from openmoe.config import ConfigError
from openmoe.observe import command

ROOT = pathlib.Path(__file__).parent.parent
# The library alone, without the slow imports of a real command.
PROGRAM = """
from openmoe.observe import command
command.prepare(__name__)
import sys, time

@command.guarded
def main(what):
  if what == 'wait':
    print('ready', flush=True)
    time.sleep(60)
  elif what == 'import':
    pass
  elif what == 'read':
    print(repr(sys.stdin.read()))
  else:
    for _ in range(20000):
      print(what)

if sys.argv[1] == 'import':
  print('ready', flush=True)
  time.sleep(60)
sys.exit(main(*sys.argv[1:]))
"""


def start(*arguments, **options) -> subprocess.Popen:
  kept = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'cwd': ROOT} | options
  return subprocess.Popen([sys.executable, '-c', PROGRAM, *arguments], **kept)


@pytest.mark.parametrize(
  ('error', 'code', 'said'),
  [
    (ConfigError('x=3 must be 4; give 4.'), 64, 'error: x=3 must be 4; give 4.'),
    (ConvertError('a\n  b'), 64, 'error: a b'),
    (NamesError('n'), 64, 'error: n'),
    (CheckpointError('c'), 65, 'error: c'),
    (Unreadable('u \x1b[2J\r'), 65, 'error: u \\x1b[2J'),
    (OSError(errno.ENOSPC, 'No space', 'run/a'), 64, 'error: run/a: the disk is full: free some'),
    (OSError(errno.EROFS, 'Read-only', 'run/a'), 64, 'error: run/a: it lies on a read-only file'),
    (OSError('odd'), 64, 'error: Reading or writing failed: odd.'),
  ],
)
def test_an_error_of_a_user_is_one_line_with_its_code(error, code, said, capsys):
  @command.guarded
  def main():
    raise error

  assert main() == code
  shown = capsys.readouterr().err
  assert shown.startswith(said) and shown.count('\n') == 1


def test_a_fault_of_ours_keeps_its_traceback():
  @command.guarded
  def main():
    return {}['missing']

  with pytest.raises(KeyError):
    main()


def test_interruption_and_codes(capsys):
  @command.guarded
  def main(found):
    if found is KeyboardInterrupt:
      raise found
    return found

  assert [main(None), main(0), main(75), main(KeyboardInterrupt)] == [0, 0, 75, 130]
  assert capsys.readouterr().err == '\n'


@pytest.mark.parametrize('where', ['import', 'wait'])
def test_ctrl_c_says_nothing(where):
  # A shell without job control starts what it puts behind it with the signal ignored, tests too.
  process = start(
    where, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
  )
  assert process.stdout.readline() == b'ready\n'
  process.send_signal(signal.SIGINT)
  shown = process.communicate(timeout=30)[1]
  assert (process.returncode, shown) == (130, b'\n')


def test_a_reader_that_has_seen_enough_is_no_error():
  process = start('text')
  process.stdout.read(10)
  process.stdout.close()
  assert process.stderr.read() == b''
  assert process.wait(30) == 0


def test_a_full_output_is_one_line():
  with open('/dev/full', 'wb') as full:
    process = start('text', stdout=full)
    shown = process.stderr.read().decode()
  assert process.wait(30) == 64
  assert shown.startswith('error: ') and 'the disk is full' in shown and shown.count('\n') == 1


def test_closed_streams_lead_nowhere():
  for number in (0, 1, 2):
    close = lambda number=number: os.close(number)
    process = start('read', stdin=subprocess.DEVNULL, preexec_fn=close)
    assert process.wait(30) == 0


def test_input_is_utf_8_and_output_replaces_what_it_cannot_show():
  environment = {**os.environ, 'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'}
  process = start('café 漢', env=environment)
  shown = process.communicate(timeout=30)
  assert shown[0].startswith(b'caf? ?\n') and shown[1] == b''
  process = start('read', env=environment, stdin=subprocess.PIPE)
  assert process.communicate('é'.encode(), timeout=30)[0] == b"'?'\n"


def test_wrong_arguments_are_usage_errors(capsys):
  parser = command.Parser('Does this.')
  parser.add_argument('--number', type=int)
  for wrong in (['--num=3'], ['--other'], ['--number=x']):
    with pytest.raises(SystemExit) as stop:
      parser.parse_args(wrong)
    assert stop.value.code == 64
    assert 'error: ' in capsys.readouterr().err


def test_what_comes_back_to_a_loop_that_is_gone_is_not_told():
  code = (
    'from openmoe.observe import command\ncommand.prepare("__main__")\n'
    'class Raises:\n  def __init__(self, text): self.text = text\n'
    '  def __del__(self): raise RuntimeError(self.text)\n'
    'for text in ("Event loop is closed", "something else"): Raises(text)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True
  )
  assert 'something else' in done.stderr and 'Event loop' not in done.stderr
