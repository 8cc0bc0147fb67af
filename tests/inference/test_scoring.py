"""Log-likelihoods of continuations against the full forward pass."""

import jax
import numpy as np
import pytest

from openmoe.inference import model as inference
from tests.inference import case

# One token, several; equal contexts, an empty one; an empty continuation.
REQUESTS = [
  ([5, 9, 33], [8]), ([5, 9, 33], [60, 2, 4]), ([], [7, 11]), ([12] * 9, [50, 51]),
  ([5, 9, 33], []), ([40], [41]),
]  # fmt: skip


@pytest.mark.parametrize('name', ['openmoe', 'jetmoe'])
def test_scores_equal_the_full_forward(name):
  scores = case.model(name).score(REQUESTS)
  for (context, continuation), score in zip(REQUESTS, scores, strict=True):
    logits = case.full_logits(name, [*context, *continuation])[len(context) :]
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    want = [log_probs[i, token] for i, token in enumerate(continuation)]
    np.testing.assert_allclose(score.token_log_probs, want, atol=3e-5)
    assert score.log_prob == pytest.approx(sum(want), abs=1e-4)
    greedy = [int(row.argmax()) for row in log_probs[: len(continuation)]]
    assert score.is_greedy == (greedy == list(continuation))


def test_greedy_continuations_are_called_greedy():
  model = case.model('jetmoe')
  (found,) = model.generate([[5, 9, 33]], 4)[0]
  (score,) = model.score([([5, 9, 33], found.tokens)])
  assert score.is_greedy and score.token_log_probs == pytest.approx(found.log_probs, abs=2e-5)


def test_a_context_is_read_once(monkeypatch):
  seen = []
  real = inference.score
  spy = lambda params, tokens, *rest, **kw: (
    seen.append(tokens.shape) or real(params, tokens, *rest, **kw)
  )
  monkeypatch.setattr(inference, 'score', spy)
  context = [5, 9, 33]
  case.model('openmoe').score([(context, [8, 4]), (context, [60, 3]), (context, [7, 7])])
  assert [shape[0] for shape in seen] == [1]


@pytest.mark.slow
def test_sharded_scores_agree():
  one = case.model('jetmoe').score(REQUESTS)
  many = case.model('jetmoe', 2).score(REQUESTS)
  for a, b in zip(one, many, strict=True):
    assert a.token_log_probs == pytest.approx(b.token_log_probs, abs=2e-5)
