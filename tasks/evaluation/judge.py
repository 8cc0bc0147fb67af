"""The two sides of a judgement: the process of the program, and the process of its tests.

Both are locked in (jail.py) and talk through wire.py. Names that the tests do not define are looked
up in the program, its functions are called over there, and results come back as plain values,
compared here. So a program passes by answering right: there is no secret to find, no channel to
write to, no test to jump over and no object to be equal to everything. The program's process is
forked before anything of the job is read; the other alone has the tests and the way to report.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import collections.abc
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Collection

from tasks.evaluation import jail, split, wire

_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


def _reason(error: BaseException) -> str:
  text = str(error) if isinstance(error, wire.Raised) else f'{type(error).__name__}: {error}'
  return text[:500]


# --- the program's process


class _Program:
  """What the tests may ask of the program."""

  def __init__(self):
    module = types.ModuleType('__main__')
    sys.modules['__main__'] = module
    self._names = vars(module)
    self._body: list[ast.stmt] = []
    self._flags = 0

  def load(self, source: str) -> None:
    """Reads the program; raises what its text is wrong in."""
    whole = compile(source, 'program', 'exec', dont_inherit=True)
    self._flags = whole.co_flags & _FUTURE
    self._body = ast.parse(source, 'program').body

  def execute(self, first: int, end: int | None) -> None:
    """Runs statements of the top level."""
    part = ast.Module(self._body[first:end], [])
    exec(compile(part, 'program', 'exec', self._flags, dont_inherit=True), self._names)

  def name(self, name: str):
    """The value of a name of the top level, or else Python's; NameError if there is none."""
    if name in self._names:
      return self._names[name]
    if name in vars(builtins):
      return vars(builtins)[name]
    raise NameError(f'name {name!r} is not defined')


def _refuse_tracing(event: str, args: tuple) -> None:
  """An audit hook: a trace function could jump over statements of the program's own text."""
  del args
  if event in ('sys.settrace', 'sys.setprofile'):
    raise PermissionError(f'{event} is not for programs that are judged')


def run_program(reader: int, writer: int, settings: dict) -> None:
  """Executes what the tests' process sends, locked in.

  Args:
    reader: pipe from the tests' process.
    writer: pipe to it.
    settings: arguments of jail.lock_up.
  """
  sys.argv[:] = ['program.py']
  sys.path[:] = jail.module_path()
  program = _Program()
  serve = {
    **wire.QUESTIONS,
    'load': program.load,
    'execute': program.execute,
    'name': program.name,
    'call': lambda function, args, kwargs: function(*args, **kwargs),
    'get': getattr,
    'set': setattr,
    'isinstance': lambda kind, value: isinstance(value, kind),
  }
  try:
    jail.lock_up(**settings)
    ready = b'1'
  except OSError as error:
    ready = str(error).encode() or b'?'
  os.write(writer, len(ready).to_bytes(1, 'little') + ready)
  if ready == b'1':
    sys.addaudithook(_refuse_tracing)
    wire.Peer(reader, writer, serve).answer_until_end()


# --- the tests' process


class _Names(dict):
  """Names of the tests; what they do not define, the program does.

  Args:
    peer: the way to the program.
    own: names that the program gives a meaning even where Python has something of that name.
    built_in: other names that Python gives a meaning.
    modules: names that mean a module of Python's.
  """

  def __init__(
    self, peer: wire.Peer, own: Collection[str], built_in: dict, modules: Collection[str]
  ):
    super().__init__(__name__='__main__', __builtins__=built_in)
    self._peer, self._own, self._built_in, self._modules = peer, own, built_in, modules

  def __missing__(self, name: str):
    if name not in self._own:
      if name in self._built_in:
        raise KeyError(name)
      if name in self._modules:
        return importlib.import_module(name)
    return self._peer.request('name', name)


def _call(function, args, kwargs):
  """Calls a function that the tests gave the program; no class, which could make new ones."""
  kinds = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
  if not isinstance(function, kinds):
    raise TypeError('the tests gave no such function')
  return function(*args, **kwargs)


def _iterator(step: Callable) -> Callable:
  def checked(value):
    if not isinstance(value, collections.abc.Iterator) or isinstance(value, wire.Remote):
      raise TypeError('the tests gave no such iterator')
    return step(value)

  return checked


def _judge(peer: wire.Peer, job: dict) -> None:
  """Raises unless the program passes."""
  if job['tests'] is None:
    text = split.Text(job['program'])
    peer.request('load', text.program)
    names = _Names(peer, text.own, split.BUILTINS, ('math', 'cmath'))
    parts = text.parts
  else:
    peer.request('load', job['program'])
    names = _Names(peer, job['names'], vars(builtins), sys.stdlib_module_names)
    parts = [([], 0, None), (ast.parse(job['tests'], 'tests').body, 0, 0)]
  for tests, first, end in parts:
    if tests:
      code = compile(ast.Module(tests, []), 'tests', 'exec', dont_inherit=True)
      exec(code, names)
    else:
      peer.request('execute', first, end)
  if peer.broken:
    raise wire.Broken(peer.broken)


def run_tests(reader: int, writer: int, source: int, report: int, settings: dict) -> None:
  """Reads a job, runs its tests against the program, locked in, and reports.

  Args:
    reader: pipe from the program's process.
    writer: pipe to it.
    source: the job, JSON to the end of the file: program, tests (or null), names.
    report: pipe for JSON: passed, reason; passed is null where a process could not be locked in.
    settings: arguments of jail.lock_up.
  """
  with open(source, 'rb') as file:
    job = json.load(file)
  sys.path[:] = jail.module_path()
  passed: bool | None = False
  try:
    jail.lock_up(**settings)
    ready = os.read(reader, os.read(reader, 1)[0])
    if ready != b'1':
      raise OSError(ready.decode())
  except (OSError, IndexError) as error:
    passed, reason = None, str(error) or 'the program could not be started'
  else:
    peer = wire.Peer(
      reader, writer, {'call': _call, 'iter': _iterator(iter), 'next': _iterator(next)}
    )
    try:
      _judge(peer, job)
      passed, reason = True, 'passed'
    # Whatever ends the tests, they have not run to their end.
    except BaseException as error:  # noqa: BLE001
      reason = peer.broken or _reason(error)
  os.write(report, json.dumps([passed, reason]).encode())
