"""The recorded values of the original system, through the command that users run."""

import json
import pathlib

import pytest

from tests.parity import flaxformer

FILE = pathlib.Path(__file__).parent.parent / 'golden' / 'flaxformer_moe_a.npz'


@pytest.mark.parametrize('dispatch', ['mask', 'scatter'])
def test_parity_with_the_original(dispatch, capsys):
  assert flaxformer.main([str(FILE), '--dispatch', dispatch, '--json']) == 0
  result = json.loads(capsys.readouterr().out)
  for name, limit in flaxformer.LIMITS.items():
    assert result[name] <= limit, name
  # bfloat16 has 8 bits: logits of about 2 agree to a few of the last of them.
  assert result['train_logits_bf16'] < 0.05
  assert result['eval_logits_bf16'] < 0.05
