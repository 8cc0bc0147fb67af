"""Who decides whether a program passed: honest tests work, and no program takes a pass."""

from __future__ import annotations

import pytest

from tasks.evaluation import jail, sandbox, split

pytestmark = pytest.mark.skipif(
  not (jail.has_seccomp() and jail.landlock_version()),
  reason='needs Linux with seccomp and Landlock',
)
_ROOMY = sandbox.Limits(seconds=30.0)
_WRONG = 'def f(x): return 0\n'
_TESTS = 'def check(candidate):\n  assert candidate(1) == 2\n  assert candidate(4) == 5\ncheck(f)\n'


def judged(program: str, tests: str | None = _TESTS, names=('f',)) -> str:
  return sandbox.run(program, _ROOMY, tests=tests, names=names).reason


HONEST = {
  'a loop, a tolerance, a helper': (
    'def f(x): return x / 3\n',
    'import math\ndef near(a, b): return abs(a - b) < 1e-9\n'
    'for i in range(9):\n  assert near(f(i), i / 3)\nassert math.isnan(f(math.nan))\n',
  ),
  'another name, and other functions of the program': (
    'def shift(s): return s[1:] + s[:1]\ndef f(s): return s[-1:] + s[:-1]\n',
    'def check(candidate):\n  assert candidate(shift("abc")) == "abc"\n'
    '  assert candidate is f\ncheck(f)\n',
  ),
  'plain values, nested': (
    'def f(x): return x\n',
    'values = [None, True, -1, 1 << 200, 1.5, 2j, "\\ud800é", b"\\0", ..., int, range(3),\n'
    '  (1, [2, {"a": {3, frozenset({4})}}], ()), {(1, "b"): [[]]}, bytearray(b"x")]\n'
    'assert f(values) == values\n'
    'assert list(map(type, f(values))) == list(map(type, values))\n',
  ),
  'deep, circular and shared': (
    'def f(x): return x\ndef deep(n):\n  r = []\n  for _ in range(n): r = [r]\n  return r\n',
    'x = [1]; x.append(x)\ny = f(x)\nassert y is x\nassert f(deep(5000))[0][0]\n'
    'a = []\nb = f([a, a])\nassert b[0] is b[1] is a\n',
  ),
  'changed arguments': (
    'def f(x, d):\n  x.sort()\n  d["n"] = [len(x)]\n  x[1].append(9)\n',
    'inner = [5]\nx, d = [inner, [3]], {}\nassert f(x, d) is None\n'
    'assert x == [[3], [5, 9]] and x[1] is inner and d == {"n": [2]}\n',
  ),
  'functions as arguments and results': (
    'def f(g, xs): return [g(x) for x in xs]\ndef adder(n): return lambda x: x + n\n',
    'seen = []\ndef g(x):\n  seen.append(x)\n  return x * 2\n'
    'assert f(g, [1, 2]) == [2, 4] and seen == [1, 2]\nassert adder(3)(4) == 7\n'
    'assert f(str, iter([1, 2])) == ["1", "2"]\nassert sorted([3, 1], key=adder(0)) == [1, 3]\n',
  ),
  'classes of the program': (
    'class Node:\n  def __init__(self, v): self.v, self.left = v, None\n'
    '  def __eq__(self, other): return self.v == other.v\n'
    'def f(n): return 1 + f(n.left) if n else 0\n',
    'root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\nassert f(root) == 3\n'
    'assert root.left.v == 2 and Node(1) == Node(1) and Node(1) != Node(2)\n'
    'assert isinstance(root, Node) and root != 1\n',
  ),
  'generators, subclasses, numbers': (
    'import collections, decimal, fractions, numpy\ndef f(x): return (i for i in range(x))\n'
    'def count(x): return collections.Counter(x)\nPoint = collections.namedtuple("Point", "x y")\n'
    'def rest():\n  return [numpy.float64(1.5), numpy.int64(2), numpy.bool_(False),\n'
    '    decimal.Decimal("0.5"), fractions.Fraction(1, 2), Point(1, 2)]\n',
    'assert list(f(3)) == [0, 1, 2]\nassert count("aab") == {"a": 2, "b": 1}\n'
    'assert rest() == [1.5, 2, False, 0.5, 0.5, (1, 2)]\nassert not rest()[2]\n',
  ),
  'a built-in name of its own': ('def f(a, b): return a * b\nsum = f\n', 'assert f(2, 3) == 6\n'),
  'exceptions': (
    'def f(x): raise ValueError("no")\n',
    'try:\n  f(1)\n  raise Exception\nexcept ValueError as error:\n  assert str(error) == "no"\n',
  ),
  'the future': (
    'from __future__ import annotations\ndef f(x: No): return x\n',
    '\nassert f(1) == 1\n',
  ),
}


# They look at what an assertion did to data; in one text that lies with the program, out of sight.
_OWN_TESTS = {'deep, circular and shared', 'changed arguments'}


@pytest.mark.parametrize('name', HONEST)
def test_honest_programs_pass(name):
  program, tests = HONEST[name]
  assert judged(program, tests) == 'passed'


@pytest.mark.parametrize('name', sorted(set(HONEST) - _OWN_TESTS))
def test_tests_in_the_programs_text_are_found(name):
  assert judged(''.join(HONEST[name]), None) == 'passed'
  assert judged(''.join(HONEST[name]) + 'assert f is None\n', None) == 'AssertionError: '


def test_a_name_of_python_is_the_programs_only_where_it_is_asked_for():
  program = 'def f(x): return 3\ndef abs(x): return 0\ndef sum(a, b): return a + b\n'
  assert judged(program, 'assert abs(f(1) - 9) < 1') == 'AssertionError: '
  assert judged(program, 'assert sum(1, 2) == 3', ('sum',)) == 'passed'
  assert judged(
    program + 'import math\nmath.isclose = lambda *_: True', 'assert math.isclose(1, 2)'
  )


ANYTHING = (
  'class Any:\n'
  + ''.join(f'  def __{n}__(self, *_): return True\n' for n in ('eq', 'ne', 'lt', 'le', 'contains'))
  + ''.join(f'  def __{n}__(self, *_): return 0\n' for n in ('sub', 'rsub', 'abs', 'hash', 'round'))
)
TAKERS = {
  'equal to everything': f'{ANYTHING}def f(x): return Any()\n',
  'equal inside': f'{ANYTHING}class S(int, Any): __eq__ = Any.__eq__\ndef f(x): return S(0)\n',
  'leaves': f'{_WRONG}import sys\nsys.exit(0)\n',
  'leaves at once': f'{_WRONG}import os\nos._exit(0)\n',
  'leaves in a test': 'import os\ndef f(x): os._exit(0)\n',
  'replaces what writes': (
    f'{_WRONG}import os, json\nwrite = os.write\nos.write = lambda fd, b: write(fd, b"passed")\n'
    'json.dumps = lambda *_, **__: "[true, \\"passed\\"]"\n'
  ),
  'replaces Python': (
    f'{_WRONG}import builtins\nbuiltins.exec = builtins.compile = lambda *_: None\n'
    'builtins.AssertionError = type("E", (BaseException,), {})\n'
  ),
  'jumps over tests': (
    f'{_WRONG}import sys\ndef trace(frame, event, arg):\n  if event == "line":\n'
    '    try: frame.f_lineno += 1\n    except ValueError: pass\n  return trace\n'
    'sys.settrace(trace)\nsys._getframe().f_trace = trace\n'
  ),
  'looks around': (
    f'{_WRONG}import gc, sys\nfor o in gc.get_objects():\n'
    '  if isinstance(o, dict) and "check" in o: o["check"] = lambda c: None\n'
    'f_ = sys._getframe()\nwhile f_:\n  for v in list(f_.f_locals.values()):\n'
    '    if callable(getattr(v, "fail", None)): v.broken = None\n  f_ = f_.f_back\n'
  ),
  'writes everywhere': (
    f'{_WRONG}import os\nfor fd in range(64):\n  for text in (b"[true, 1]\\n", b"passed"):\n'
    '    try: os.write(fd, text)\n    except OSError: pass\n'
  ),
  'keeps threads': (
    f'{_WRONG}import threading, sys\ndef work():\n  while True:\n'
    '    for m in list(sys.modules.values()):\n      m.check = lambda c: None\n'
    'threading.Thread(target=work, daemon=True).start()\n'
  ),
  'at the end': f'{_WRONG}import atexit, os\natexit.register(os._exit, 0)\n',
  'defines the test': f'{_WRONG}def check(c): pass\n',
  'asks the judge to make a class': (
    'import sys\ndef peer():\n  f = sys._getframe()\n'
    '  while not hasattr(f.f_locals.get("self"), "request"): f = f.f_back\n'
    '  return f.f_locals["self"]\n'
    'def f(x):\n  return peer().request("call", type, ("X", (), {"__eq__": lambda *_: True}), {})\n'
  ),
  'breaks the rules': (
    'import sys, os\ndef f(x):\n  for fd in range(3, 64):\n'
    '    try: os.write(fd, (3).to_bytes(8, "little") + b"[1]")\n    except OSError: pass\n'
  ),
}


@pytest.mark.parametrize('name', TAKERS)
def test_no_program_takes_a_pass(name):
  assert judged(TAKERS[name]) != 'passed'


@pytest.mark.parametrize(
  'reply',
  [
    b'{"value":["yours",0],"nodes":[]}',
    b'{"value":["@",-1],"nodes":[["l"]]}',
    b'{"value":["@",0],"nodes":[["t",["@",0]]]}',
    b'{"value":["n","eval"],"nodes":[]}',
    b'{"value":{"a":1},"nodes":[]}',
    b'{"value":["peer"],"nodes":[]}',
    b'{"value":2,"nodes":[],"raised":[1,2]}',
    b'{"value":' + b'[' * 100000,
    b'\xff\xff',
  ],
)
def test_a_reply_against_the_rules_ends_the_judgement(reply):
  program = (
    f'import sys, os\nreply = {reply!r}\ndef f(x):\n  frame = sys._getframe()\n'
    '  while not hasattr(frame.f_locals.get("self"), "_writer"):\n'
    '    frame = frame.f_back\n  writer = frame.f_locals["self"]._writer\n'
    '  writer.write(len(reply).to_bytes(8, "little") + reply); writer.flush(); os._exit(0)\n'
  )
  # Even tests that swallow every exception do not pass.
  assert 'breaks the rules' in judged(program, 'try:\n  f(1)\nexcept Exception:\n  pass\n')


_IN_TEXT = {
  'reads the tests in its own text': (
    'import gc\ndef f(x):\n  for o in gc.get_objects():\n'
    '    if type(o) is dict and "_body" in o: source = ast.dump(o["_body"])\n'
    '  for text in gc.get_objects():\n'
    '    if type(text) is list and "assert f(1)" in str(text[:9]): return 2\n'
    '  frame = __import__("sys")._getframe()\n'
    '  while frame:\n'
    '    if "assert f(1)" in str(frame.f_locals): return 2\n'
    '    frame = frame.f_back\n'
  ),
  'changes a built-in function': 'def f(x): return 0\ndef abs(x): return 0\nlen = all = abs\n',
  'equal to everything': (
    'class A(int):\n  __eq__ = __ne__ = __lt__ = __gt__ = lambda *_: True\ndef f(x): return A()\n'
  ),
  'leaves by a test': (
    'def f(x): return 0\n'
    'assert [__import__("os").write(n, b\'[true, "passed"]\') for n in range(9, 3, -1)]\n'
    'assert __import__("os")._exit(0)\n'
  ),
  'leaves by a check': (
    'def f(x): return 0\ndef check(c):\n  import os\n  for n in range(3, 9):\n'
    '    try: os.write(n, b\'[true, "passed"]\')\n    except OSError: pass\n  os._exit(0)\n'
    'check(1)\n'
  ),
}


@pytest.mark.parametrize('name', _IN_TEXT)
def test_tests_in_a_text_are_out_of_reach(name):
  text = f'{_IN_TEXT[name]}\nassert f(1) == 2\nassert abs(f(1) - 2) < 1e-6\n'
  assert judged(text, None) != 'passed'


def test_a_text_keeps_its_lines_without_its_tests():
  text = (
    'x = 1\nassert (x\n  == 1); y = 2; assert y\n@f\ndef check(c):\n  assert c\ncheck(x)\nz = "é"'
  )
  found = split.Text(text)
  assert found.program == 'x = 1\npass; y = 2; pass\n\npass\n\n\npass\nz = "é"'
  assert [(len(tests), first, end) for tests, first, end in found.parts] == [
    (0, 0, 1), (1, 1, 2), (0, 2, 3), (1, 3, 4), (1, 4, 5), (1, 5, 6), (0, 6, 7)
  ]  # fmt: skip


def test_built_in_functions_that_reach_further_are_the_programs():
  assert (
    judged('class A: b = 3\nassert getattr(A, "b") == 3 and eval("1 + 1") == 2', None) == 'passed'
  )
  assert judged('def sum(a, b): return a * b\nassert sum(3, 4) == 12', None) == 'passed'
  assert judged('assert nothing', None).startswith('NameError')


def test_no_statement_of_a_text_is_jumped_over():
  trace = (
    'import sys\ndef trace(frame, event, arg):\n'
    '  if event == "line" and frame.f_lineno == 8: frame.f_lineno = 9\n  return trace\n'
    'sys.settrace(trace)\nsys._getframe().f_trace = trace\nx = 1\nraise ValueError\nx = 2\n'
  )
  assert judged(trace, None).startswith('PermissionError')


def test_judgements_leave_nothing_to_the_next():
  assert judged('import math\nmath.tau = None\ndef f(x): return x + 1\n') == 'passed'
  assert judged('import math\ndef f(x): return int(x + math.tau - 5)\n') == 'passed'
