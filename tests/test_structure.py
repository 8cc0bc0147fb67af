"""The rules of the house: which way imports point, what they may pull in, how long a file may be.

A module of openmoe/ without a place in the tables below fails: decide where it belongs.
"""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 450

# What each room of openmoe/ may import of the others: a module of the top level or a package.
_MODEL = {'types', 'config', 'partitioning', 'layers', 'models'}
_STATE = _MODEL | {'losses', 'optimizer', 'microbatches', 'train_step'}
ROOMS = {
  'types': set(),
  'config': {'types'},
  'programme': {'types', 'config'},
  'slices': {'config'},
  'partitioning': {'types', 'config', 'slices'},
  'layers': {'types', 'config', 'partitioning'},
  'models': {'types', 'config', 'partitioning', 'layers'},
  'losses': _MODEL,
  'optimizer': {'types', 'config'},
  'microbatches': {'types'},
  'train_step': _MODEL | {'losses', 'optimizer', 'microbatches'},
  'compiled_step': _MODEL | {'train_step'},
  'classification': _STATE | {'data', 'checkpoint', 'inference'},
  'plan': _STATE | {'programme'},
  'data': {'types', 'config', 'programme', 'checkpoint', 'observe'},
  'feed': {'types', 'config', 'programme', 'data', 'partitioning'},
  'checkpoint': {'types', 'config'},
  'observe': {'config', 'checkpoint'},
  'inference': _STATE | {'checkpoint', 'observe', 'programme', 'plan'},
  'serving': _MODEL | {'inference', 'checkpoint'},
  'evaluation': {'types', 'config', 'checkpoint', 'observe', 'inference'},
  'atlas': _MODEL | {'checkpoint', 'observe', 'inference', 'evaluation'},
  'health': {'types', 'config', 'observe'},
  'report': {'config', 'checkpoint', 'observe', 'health'},
  'running': _STATE | {'programme', 'data', 'feed', 'checkpoint', 'observe', 'health'},
  'train': _STATE
  | {
    'compiled_step',
    'programme',
    'data',
    'feed',
    'plan',
    'checkpoint',
    'observe',
    'health',
    'running',
  },
  'pods': _STATE | {'compiled_step', 'programme', 'plan', 'checkpoint', 'observe', 'health'},
  'drill': _STATE | {'programme', 'checkpoint', 'observe'},
}
# The other packages: what each may import of ours.
PACKAGES = {
  'openmoe': {'openmoe'},
  'tasks': {'tasks', 'openmoe'},
  'convert': {'convert', 'openmoe'},
  'scripts': {'scripts', 'tasks', 'convert', 'openmoe'},
  # Nothing imports it: it alone knows t5x, which is a checkout of its own.
  'openmoe_t5x': {'openmoe_t5x', 'convert', 'openmoe'},
}
# tasks are data: they know how examples are made, not what is trained on them.
TASKS_MAY = {'types', 'config', 'data', 'evaluation'}


def sources(*packages: str) -> list[pathlib.Path]:
  """Python files of top-level packages, relative to the repository."""
  return sorted(p.relative_to(ROOT) for name in packages for p in (ROOT / name).rglob('*.py'))


def imported_names(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports, wherever in the file; relative imports are made absolute."""
  names = set()
  for node in ast.walk(ast.parse((ROOT / path).read_text(), filename=str(path))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
      base = '.'.join((*above, *([node.module] if node.module else [])))
      # `from openmoe import train` imports a module, so the names count as well.
      names |= {f'{base}.{alias.name}' for alias in node.names}
  return names


def room(dotted: str) -> str | None:
  """The room of openmoe/ that a dotted name lies in, or None for anything else."""
  parts = dotted.split('.')
  return parts[1] if parts[0] == 'openmoe' and len(parts) > 1 else None


def room_of_file(path: pathlib.Path) -> str:
  return path.with_suffix('').parts[1]


@pytest.mark.parametrize('path', sources('openmoe'), ids=str)
def test_imports_inside_openmoe_point_one_way(path):
  here = room_of_file(path)
  if here == '__init__':
    assert not imported_names(path) - {'__future__.annotations'}, 'openmoe/__init__ runs no work'
    return
  assert here in ROOMS, f'{path}: give {here!r} a place in ROOMS'
  allowed = ROOMS[here] | {here}
  wrong = {n for n in imported_names(path) if room(n) and room(n) not in allowed}
  assert not wrong, f'{path} imports {sorted(wrong)}; {here} may import {sorted(allowed)}'


def test_rooms_form_no_circle():
  order = tuple(graphlib.TopologicalSorter(ROOMS).static_order())
  assert order[0] == 'types'


@pytest.mark.parametrize('path', sources(*PACKAGES), ids=str)
def test_packages_import_only_what_is_below_them(path):
  here = path.parts[0]
  for name in imported_names(path):
    top = name.split('.')[0]
    assert top not in PACKAGES or top in PACKAGES[here], f'{path} imports {name}'
    assert top != 'tests', f'{path} imports {name}'
    assert top not in ('t5x', 'flaxformer') or here == 'openmoe_t5x', f'{path} imports {name}'
    if here == 'tasks' and room(name):
      assert room(name) in TASKS_MAY, f'{path} imports {name}; tasks may use {sorted(TASKS_MAY)}'


@pytest.mark.parametrize('path', sources('openmoe', 'convert'), ids=str)
def test_the_library_does_not_know_gin_or_flags(path):
  tops = {'.'.join(n.split('.')[:2]) for n in imported_names(path)}
  known = {n for n in tops if n.split('.')[0] == 'gin' or n in ('absl.flags', 'absl.app')}
  assert not known, f'{path} imports {known}: configuration belongs to scripts/'


def test_gin_is_not_a_package():
  assert not (ROOT / 'gin' / '__init__.py').exists(), 'gin/__init__.py shadows gin-config'


@pytest.mark.parametrize('path', sources(*PACKAGES, 'tests'), ids=str)
def test_files_are_short(path):
  lines = len((ROOT / path).read_text().splitlines())
  assert lines <= MAX_LINES, f'{path} has {lines} lines, more than {MAX_LINES}: split it'


def opens_text_without_encoding(call: ast.Call) -> bool:
  """Whether a call reads or writes text in the encoding of the locale."""
  if any(keyword.arg in ('encoding', None) for keyword in call.keywords):
    return False
  function, place = call.func, None
  if isinstance(function, ast.Name) and function.id == 'open':
    place = 1
  elif isinstance(function, ast.Attribute):
    if function.attr in ('read_text', 'write_text'):
      return len(call.args) == (function.attr == 'write_text')
    owner = function.value.id if isinstance(function.value, ast.Name) else ''
    if function.attr == 'open' and owner not in NOT_FILES:
      place = 0
  mode = next((k.value for k in call.keywords if k.arg == 'mode'), None)
  if place is not None and mode is None and len(call.args) > place:
    mode = call.args[place]
  if place == 0 and call.args and not isinstance(call.args[0], ast.Constant):
    return False  # a method of the same name of something else
  text = any(keyword.arg == 'text' for keyword in call.keywords)
  return text or (place is not None and 'b' not in str(getattr(mode, 'value', 'r')))


NOT_FILES = ('os', 'tarfile', 'ts', 'tokenize', 'tensorstore', 'gzip')


@pytest.mark.parametrize('path', sources(*PACKAGES), ids=str)
def test_text_is_utf_8_whatever_the_locale(path):
  calls = [
    n for n in ast.walk(ast.parse((ROOT / path).read_text('utf-8'))) if isinstance(n, ast.Call)
  ]
  wrong = [f'{path}:{call.lineno}' for call in calls if opens_text_without_encoding(call)]
  assert not wrong, f"{wrong}: name encoding='utf-8'"


@pytest.mark.parametrize(
  ('code', 'wrong'),
  [
    ("open('a')", True),
    ("open('a', 'rb')", False),
    ("open('a', mode='wb')", False),
    ("open('a', encoding='utf-8')", False),
    ('p.read_text()', True),
    ("p.read_text('utf-8')", False),
    ('p.write_text(x)', True),
    ("p.open('w')", True),
    ("p.open('ab')", False),
    ('run(c, text=True)', True),
    ('store.open(name)', False),
  ],
)
def test_the_rule_of_encodings_sees_every_form(code, wrong):
  assert opens_text_without_encoding(ast.parse(code, mode='eval').body) is wrong


# Programs of their own, which read what this project wrote to them.
SPEAK_JSON = (
  'openmoe/checkpoint/safe_json.py',
  'openmoe/inference/template.py',
  'openmoe/inference/template_worker.py',
  'openmoe/running/keeper.py',
  'tasks/evaluation/judge.py',
  'tasks/evaluation/sandbox.py',
  'tasks/evaluation/warden.py',
)


@pytest.mark.parametrize('path', sources('openmoe', 'convert', 'tasks'), ids=str)
def test_json_is_read_in_one_room(path):
  """Python's parser raises five things, fills memory, and gives any type."""
  for call in ast.walk(ast.parse((ROOT / path).read_text('utf-8'))):
    if isinstance(call, ast.Call) and ast.unparse(call.func) in ('json.load', 'json.loads'):
      own = 'json.dumps(' in ast.unparse(call)  # there and back, for lists and plain keys
      assert own or str(path) in SPEAK_JSON, f'{path}:{call.lineno}: use checkpoint.safe_json'


def code_lines(path: pathlib.Path) -> int:
  """Lines of a file that are neither blank nor of its docstring."""
  text = (ROOT / path).read_text(encoding='utf-8')
  docstring = ast.get_docstring(ast.parse(text), clean=False) or ''
  return sum(bool(line.strip()) for line in text.replace(docstring, '').splitlines())


# Longer than a door, and why.
NOT_DOORS = {
  'scripts/gin_flags/__init__.py': 'gin and flags stay out of the library',
  'scripts/gin_flags/files.py': 'as above',
  'scripts/gin_flags/hints.py': 'tables',
}


@pytest.mark.parametrize(
  'path', [p for p in sources('scripts') if p.parent.name != 'benchmarks'], ids=str
)
def test_scripts_are_doors(path):
  assert code_lines(path) <= 90 or str(path) in NOT_DOORS, f'{path}: the library belongs elsewhere'


@pytest.mark.parametrize('package', ['openmoe.models', 'convert'])
def test_importing_pulls_in_neither_tensorflow_nor_torch(package):
  code = (
    f'import importlib, pkgutil, sys, {package} as package\n'
    'for m in pkgutil.walk_packages(package.__path__, package.__name__ + "."):\n'
    '  if not m.name.endswith("__main__"): importlib.import_module(m.name)\n'
    'heavy = sorted({"tensorflow", "torch", "seqio", "gin"} & set(sys.modules))\n'
    'sys.exit(f"{package.__name__} imports {heavy}" if heavy else 0)\n'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_the_walk_sees_every_form_of_import(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
  path = pathlib.Path('openmoe/layers/moe.py')
  (tmp_path / path).parent.mkdir(parents=True)
  (tmp_path / path).write_text(
    'import gin\nfrom openmoe import train\nfrom ..models import jetmoe\nfrom . import router\n'
    'def late():\n  import openmoe.data.stream\n'
  )
  assert imported_names(path) == {
    'gin',
    'openmoe.train',
    'openmoe.models.jetmoe',
    'openmoe.layers.router',
    'openmoe.data.stream',
  }
