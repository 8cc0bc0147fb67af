"""Every promise names tests, and they are there."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / 'docs' / 'PROMISES.md').read_text(encoding='utf-8')
REFERENCES = re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', TEXT)
COLUMNS = ['promise', 'what holds', 'conditions', 'tests', 'what it costs', 'not promised']


def rows() -> list[list[str]]:
  found = [line.strip('|').split('|') for line in TEXT.splitlines() if line.startswith('|')]
  cells = [[cell.strip() for cell in row] for row in found]
  return [row for row in cells if row != COLUMNS and not set(row[0]) <= {'-'}]


@pytest.mark.parametrize('path', sorted({path for path, _ in REFERENCES}))
def test_the_tests_that_are_named_are_there(path):
  functions = {
    node.name: node
    for node in ast.parse((ROOT / path).read_text(encoding='utf-8')).body
    if isinstance(node, ast.FunctionDef)
  }
  for name in (name for file, name in REFERENCES if file == path):
    assert name in functions, f'{path} has no {name}; docs/PROMISES.md relies on it'
    marks = ' '.join(ast.unparse(mark) for mark in functions[name].decorator_list)
    assert 'skip(' not in marks, f'{path}::{name} is skipped'
    assert 'xfail' not in marks, f'{path}::{name} may fail'


def test_every_promise_has_all_columns_and_a_test():
  assert len(rows()) >= 15
  for row in rows():
    assert len(row) == len(COLUMNS), row[0]
    assert row[1], row[0]
    assert re.search(r'`tests/.+::.+`', row[3]), f'{row[0]} has no test'
  tables = TEXT.count('| ' + ' | '.join(COLUMNS) + ' |')
  assert tables == TEXT.count('\n## ')
