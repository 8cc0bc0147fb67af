"""BIG-bench's metrics: ranking of choices, exact match, ROUGE, BLEU, and reading a generated text.

Source: bigbench 1.0.0, api/task_metrics.py and models/model_utils.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence

import numpy as np

from openmoe.evaluation.items import Item, Prediction
from tasks.bigbench.files import Leaf
from tasks.bigbench.rouge import best_rouge

# The answer ends at the first of . ? ! ; or line break, where a task says nothing else.
_DEFAULT_REGEX = r'[^\.\?\!\;\n]+'
_ECE_BUCKETS = 15


def argmax(values: Sequence[float]) -> int:
  """Index of the largest; among equals a pseudorandom one that depends on the bytes of all."""
  values = np.asarray(values, np.float64)
  largest = np.flatnonzero(values == values.max())
  return int(largest[int(hashlib.sha256(values.tobytes()).hexdigest(), 16) % len(largest)])


def _log_softmax(values: Sequence[float]) -> np.ndarray:
  values = np.asarray(values, np.float64)
  return values - np.logaddexp.reduce(values)


def final_log_probs(leaf: Leaf, log_probs: Sequence[float]) -> np.ndarray:
  """float64 [choices] that are compared: normalised over the choices unless the task declines."""
  if leaf.data.get('absolute_normalization', False):
    return np.asarray(log_probs, np.float64)
  return _log_softmax(log_probs)


def multiple_choice_grade(leaf: Leaf, item: Item, prediction: Prediction) -> float:
  """Target score of the choice with the highest log-probability."""
  return item.scores[argmax(final_log_probs(leaf, prediction.log_probs))]


def _probabilities(item: Item, prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
  """[choices] of the model, [choices] wanted."""
  total = sum(item.scores)
  wanted = np.array(item.scores) / total if total else np.zeros(len(item.scores))
  return np.exp(_log_softmax(prediction.log_probs)), wanted


def calibration(items: Sequence[Item], predictions: Sequence[Prediction]) -> dict[str, float]:
  """Brier score over all choices of all items, and expected calibration error in 15 buckets.

  Both are 0 for certainty that is right. A wrong choice counts in the Brier score with its squared
  probability, a right one with the squared distance to 1.
  """
  brier, choices = 0.0, 0
  confidence, correct = [], []
  for item, prediction in zip(items, predictions, strict=True):
    found, wanted = _probabilities(item, prediction)
    brier += float(np.sum(wanted * (found - 1) ** 2 + (1 - wanted) * found**2))
    choices += len(found)
    confidence.append(found.max())
    correct.append(float(np.argmax(wanted) == np.argmax(found)))
  confidence, correct = np.array(confidence), np.array(correct)
  edges = np.arange(1, _ECE_BUCKETS) / _ECE_BUCKETS
  bucket = np.searchsorted(edges, confidence, side='right')
  gaps = [
    abs(np.sum(correct[bucket == b]) - np.sum(confidence[bucket == b])) for b in range(_ECE_BUCKETS)
  ]
  return {
    'calibration_multiple_choice_brier_score': brier / choices,
    'expected_calibration_error': float(sum(gaps) / len(items)),
  }


def read_answer(leaf: Leaf, text: str) -> str:
  """The part of a generated text that is graded.

  Up to and with the stop string (which is overlooked at the very start), then the first match of
  the output regex, '' without one. White space stays.
  """
  stop, regex = leaf.data.get('stop_string'), leaf.data.get('output_regex')
  if stop is None and regex is None:
    regex = _DEFAULT_REGEX
  if stop:
    place = text.find(stop)
    if place > 0:
      text = text[: place + len(stop)]
  if regex:
    text = next(iter(re.findall(regex, text)), '')
  return text


def generative(leaf: Leaf, item: Item, prediction: Prediction) -> dict[str, float]:
  """exact_str_match in 0..1 and ROUGE in 0..100, whichever the task has."""
  answer = read_answer(leaf, prediction.texts[0])
  found = {}
  if 'exact_str_match' in leaf.data['metrics']:
    found['exact_str_match'] = float(answer in item.answers)
  if 'rouge' in leaf.data['metrics']:
    found.update(best_rouge(item.answers, answer))
  return found


def bleu(leaf: Leaf, items: Sequence[Item], predictions: Sequence[Prediction]) -> dict[str, float]:
  """Corpus BLEU in 0..100, {} where the task has none or sacrebleu (extra `eval`) is absent.

  It is the preferred metric of no task of BIG-bench-Lite.
  """
  if 'bleu' not in leaf.data['metrics'] or importlib.util.find_spec('sacrebleu') is None:
    return {}
  import sacrebleu

  most = max(len(item.answers) for item in items)
  # sacrebleu wants as many references everywhere: the first one fills up.
  padded = [[*item.answers, *[item.answers[0]] * (most - len(item.answers))] for item in items]
  answers = [read_answer(leaf, prediction.texts[0]) for prediction in predictions]
  score = sacrebleu.corpus_bleu(
    answers,
    [list(column) for column in zip(*padded, strict=True)],
    smooth_method='exp',
    smooth_value=0.0,
    tokenize='intl',
    use_effective_order=False,
  )
  return {'bleu': score.score}
