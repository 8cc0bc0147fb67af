"""ROUGE-1, ROUGE-2 and ROUGE-Lsum as F-measures from 0 to 100.

Words are runs of a-z and 0-9 after lower-casing: letters outside ASCII separate words. As in t5's
metrics, ' . ' ends a line; ROUGE-Lsum joins, line by line, the words of the longest common
subsequences with every line of the other side. Lin 2004, "ROUGE: a package for automatic evaluation
of summaries".

t5 gives the median of random resamples, which changes from run to run; here it is the exact mean.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

TYPES = ('rouge1', 'rouge2', 'rougeLsum')


def _words(text: str) -> list[str]:
  return re.findall('[a-z0-9]+', text.lower())


def _f_measure(hits: int, predicted: int, wanted: int) -> float:
  if not hits:
    return 0.0
  precision, recall = hits / predicted, hits / wanted
  return 2 * precision * recall / (precision + recall)


def _ngram_score(target: str, text: str, size: int) -> float:
  count = lambda words: collections.Counter(
    tuple(words[i : i + size]) for i in range(len(words) - size + 1)
  )
  wanted, found = count(_words(target)), count(_words(text))
  return _f_measure((wanted & found).total(), found.total(), wanted.total())


def _common(target: Sequence[str], words: Sequence[str]) -> set[int]:
  """Positions in `target` of one longest common subsequence of both."""
  rows, columns = len(target), len(words)
  table = [[0] * (columns + 1) for _ in range(rows + 1)]
  for i in range(rows):
    for j in range(columns):
      same = target[i] == words[j]
      table[i + 1][j + 1] = table[i][j] + 1 if same else max(table[i][j + 1], table[i + 1][j])
  found, i, j = set(), rows, columns
  while i and j:
    if target[i - 1] == words[j - 1]:
      i, j = i - 1, j - 1
      found.add(i)
    elif table[i][j - 1] > table[i - 1][j]:
      j -= 1
    else:
      i -= 1
  return found


def _lines_score(target: str, text: str) -> float:
  lines = lambda whole: [_words(line) for line in whole.split('\n') if line]
  wanted, found = lines(target), lines(text)
  left_wanted = collections.Counter(word for line in wanted for word in line)
  left_found = collections.Counter(word for line in found for word in line)
  lengths = left_found.total(), left_wanted.total()
  hits = 0
  for line in wanted:
    union = sorted(set().union(*(_common(line, other) for other in found)))
    for word in (line[i] for i in union):
      # A word counts as often as both sides have it.
      if left_wanted[word] and left_found[word]:
        hits += 1
        left_wanted[word] -= 1
        left_found[word] -= 1
  return _f_measure(hits, *lengths)


def rouge(target: str, text: str) -> dict[str, float]:
  """The three scores of a text against one target, 0 to 100."""
  target, text = (side.replace(' . ', ' .\n') for side in (target, text))
  return {
    'rouge1': 100 * _ngram_score(target, text, 1),
    'rouge2': 100 * _ngram_score(target, text, 2),
    'rougeLsum': 100 * _lines_score(target, text),
  }


def best_rouge(targets: Sequence[str], text: str) -> dict[str, float]:
  """The best of several targets, for each type."""
  scores = [rouge(target, text) for target in targets]
  return {name: max(score[name] for score in scores) for name in TYPES}
