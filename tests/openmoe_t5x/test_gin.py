"""gin/t5x: what the files bind exists. They are read as text, as t5x need not be there."""

from __future__ import annotations

import inspect
import pathlib

import pytest

from convert.t5x_gin.parse import Reference, parse
from openmoe_t5x import stream

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / 'gin/t5x').glob('*.gin'))


def statements(path):
  return parse(path.read_text('utf-8'), str(path))


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_includes_and_names_of_ours_exist(plugin, path):
  modules = {'model': plugin[0], 'partitioner': plugin[1], 'stream': stream}
  imported, bound = {}, []
  for statement in statements(path):
    if statement.kind == 'include' and not statement.name.startswith('t5x/'):
      assert (ROOT / statement.name).is_file()
    elif statement.kind == 'import':
      imported[statement.name] = statement.value
    elif statement.kind == 'binding':
      names = [statement.name] if statement.argument else []
      names += [statement.value.name] if isinstance(statement.value, Reference) else []
      bound += [(name, statement.argument) for name in names]
  for name, argument in bound:
    module, _, attribute = name.partition('.')
    if imported.get(module, '').startswith('openmoe_t5x.'):
      found = getattr(modules[module], attribute)
      own = name in {s.name for s in statements(path) if s.argument == argument}
      if own and 'Partitioner' not in attribute:  # whose arguments are t5x's
        assert argument in inspect.signature(found).parameters, name


def test_there_is_a_file_for_every_entry_point():
  assert {path.stem for path in FILES} >= {'train', 'eval', 'infer', 'precompile', 'demo'}
