"""Routing and experts as loops over tokens, float64: what every dispatcher is held against."""

from __future__ import annotations

import numpy as np


def silu(x):
  return x / (1 + np.exp(-x))


def top_k(probs_e: np.ndarray, k: int) -> list[int]:
  """Indices of the k largest, ties to the lower index."""
  return sorted(range(len(probs_e)), key=lambda e: (-probs_e[e], e))[:k]


def served(probs_gte: np.ndarray, k: int, capacity: int | None) -> list[tuple[int, int, int]]:
  """(group, token, expert) of every served choice: all first choices claim before any second."""
  result = []
  for g, probs_te in enumerate(probs_gte):
    taken = dict.fromkeys(range(probs_te.shape[1]), 0)
    choices = [top_k(probs_e, k) for probs_e in probs_te]
    for rank in range(k):
      for t, chosen in enumerate(choices):
        expert = chosen[rank]
        if capacity is None or taken[expert] < capacity:
          result.append((g, t, expert))
        taken[expert] += 1
  return result


def moe(x_gtd, router_de, wi_0_eduf, wi_1_edf, wo_efd, k, capacity) -> np.ndarray:
  """The sparse layer, token by token; dropped choices add nothing."""
  logits = x_gtd @ router_de
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  probs = exp / exp.sum(-1, keepdims=True)
  y = np.zeros_like(x_gtd)
  for g, t, e in served(probs, k, capacity):
    x = x_gtd[g, t]
    a, b = x @ wi_0_eduf[e, :, 0], x @ wi_0_eduf[e, :, 1]
    y[g, t] += probs[g, t, e] * ((a * silu(b) * (x @ wi_1_edf[e])) @ wo_efd[e])
  return y
