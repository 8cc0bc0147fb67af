"""ROUGE against the package that BIG-bench uses, where the extra `eval` brings it."""

import random

import pytest

from tasks.bigbench import rouge

WORDS = ('the', 'cat', 'sat', 'a', 'é', '3', '.', '\n', 'B-c', "don't", 'ü', 'x_y')


def test_scores_are_those_of_rouge_score():
  package = pytest.importorskip('rouge_score.rouge_scorer')
  scorer = package.RougeScorer(list(rouge.TYPES), use_stemmer=False)
  lines = lambda text: text.replace(' . ', ' .\n')
  rng = random.Random(0)
  for _ in range(300):
    target, text = (' '.join(rng.choices(WORDS, k=rng.randrange(30))) for _ in range(2))
    theirs = scorer.score(lines(target), lines(text))
    wanted = {name: 100 * score.fmeasure for name, score in theirs.items()}
    assert rouge.rouge(target, text) == pytest.approx(wanted, abs=1e-12)
