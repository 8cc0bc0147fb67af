"""What the inspector prints of a row."""

from __future__ import annotations

import numpy as np

from openmoe.data.features import Example
from scripts import inspect_data
from tests.data import case


def text_ids(text: str, *more: int) -> np.ndarray:
  return np.array([*case.VOCABULARY.encode(text), *more], np.int32)


def test_tokens_show_sentinels_eos_and_newlines():
  shown = inspect_data.show_tokens(
    text_ids('a\nb', case.FIRST_SENTINEL, case.EOS), case.VOCABULARY, loss=True, color=False
  )
  assert shown == 'a\\nb<0><eos>'
  colored = inspect_data.show_tokens(text_ids('a'), case.VOCABULARY, loss=True, color=True)
  assert colored == '\033[32ma\033[0m'


def test_objectives_have_names():
  tokens = text_ids('a')
  name = inspect_data.objective_name
  assert name(Example(tokens, tokens, objective=2)) == '[NLG] spans of 3, 50%'
  assert name(Example(tokens, tokens, objective=5)) == '[S2S] prefix LM'
  assert name(Example(tokens[:0], tokens)) == 'next token'
  assert name(Example(tokens, tokens)) == 'inputs to targets'


def test_a_row_tells_where_its_segments_come_from(tmp_path):
  case.make_corpus(tmp_path, 'inspected')
  inspect_data._FLAGS(['test', '--mixture=inspected_ul2'])
  try:
    row = (Example(text_ids('in'), text_ids('out', 1), 'inspected', (2**32 + 4, 2**32 + 4), 0),)
    shown = inspect_data.show_row(row, case.VOCABULARY, color=False, split='train')
  finally:
    inspect_data._FLAGS.unparse_flags()
  assert (
    f'inspected | {tmp_path}/inspected-1.jsonl:5 | [NLU] spans of 3, 15% | 2 + 4 tokens' in shown
  )
  assert 'context: in' in shown and 'loss: out<eos>' in shown
