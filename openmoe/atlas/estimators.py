"""What is computed of counts: pure functions of arrays, each with its formula and its range.

Counts are of assignments, one (token, choice) pair each, with the experts on the last axis. Where a
published script computes something else than the definition beside it, there are two functions, and
a figure names which it shows: AS_PUBLISHED or AS_DEFINED. Sources: arXiv 2402.01739 (OpenMoE),
2409.02060 (OLMoE) with its scripts, Marin's analyze_routing.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

AS_PUBLISHED, AS_DEFINED = 'as_published', 'as_defined'
DEAD = 0.01  # of a uniform share


def shares(counts_Ge: np.ndarray) -> np.ndarray:
  """p_e(g) = assignments of group g to e / assignments of g; sums to 1, NaN for an empty group."""
  total = counts_Ge.sum(axis=-1, keepdims=True)
  return np.divide(counts_Ge, total, out=np.full(counts_Ge.shape, np.nan), where=total > 0)


def sigma(counts_Ge: np.ndarray) -> np.ndarray:
  """sqrt(mean_e (p_e - 1/E)^2): 0 for uniform, 0.1210 for two equal experts of 32."""
  p = shares(counts_Ge)
  return np.sqrt(np.mean(np.square(p - 1 / p.shape[-1]), axis=-1))


def effective_experts(counts_Ge: np.ndarray) -> np.ndarray:
  """1 / sum_e p_e^2 = 1 / (E sigma^2 + 1/E), from 1 to E."""
  return 1 / np.sum(np.square(shares(counts_Ge)), axis=-1)


def entropy(counts: np.ndarray, axis: int = -1) -> np.ndarray:
  """Bits, of counts along an axis; 0 to log2 of its length."""
  total = counts.sum(axis=axis, keepdims=True)
  p = counts / np.maximum(total, 1e-300)
  return -np.sum(p * np.log2(np.where(p > 0, p, 1.0)), axis=axis)


def mutual_information(counts_Ve: np.ndarray) -> dict[str, float]:
  """Between the two sides of a table, bits.

  I = H(V) + H(E) - H(V, E). What chance alone adds is (C - V - E + 1) / (2 N ln 2) for C cells, V
  rows and E columns that are filled, of N independent samples (Miller and Madow): `bias`, which
  `corrected` is without. `published_bias` is Marin's (V - 1)(E - 1) / (2 N ln 2), which takes all
  cells for possible: the same where every row meets every column, and far too much where a row
  decides its column. `normalised` is corrected / H(E). Rows that are seen a few times only escape
  both; compare with a shuffle.
  """
  total = float(counts_Ve.sum())
  if not total:
    names = ('plug_in', 'bias', 'published_bias', 'corrected', 'normalised', 'entropy')
    return dict.fromkeys(names, float('nan'))
  of_rows, of_columns = counts_Ve.sum(axis=1), counts_Ve.sum(axis=0)
  h_e = float(entropy(of_columns))
  plug_in = float(entropy(of_rows)) + h_e - float(entropy(counts_Ve.ravel()))
  rows, columns = int((of_rows > 0).sum()), int((of_columns > 0).sum())
  cells, scale = int((counts_Ve > 0).sum()), 2 * total * np.log(2)
  bias = (cells - rows - columns + 1) / scale
  corrected = plug_in - float(bias)
  return {
    'plug_in': plug_in,
    'bias': float(bias),
    'published_bias': float((rows - 1) * (columns - 1) / scale),
    'corrected': corrected,
    'normalised': corrected / h_e if h_e else 0.0,
    'entropy': h_e,
  }


def lift(counts_Ve: np.ndarray, least: int = 20) -> np.ndarray:
  """P(e | v) / P(e); NaN for fewer than `least` assignments of (v, e)."""
  p_e = shares(counts_Ve.sum(axis=0))
  with np.errstate(divide='ignore', invalid='ignore'):
    found = shares(counts_Ve) / p_e
  return np.where(counts_Ve >= least, found, np.nan)


def load_numbers(counts_e: np.ndarray) -> dict[str, float]:
  """How even a load is, by the names in use."""
  p = shares(np.asarray(counts_e, float))
  ideal = 1 / len(p)
  return {
    'cv': float(p.std() / p.mean()),
    'max_over_mean': float(p.max() / ideal),
    'min_over_mean': float(p.min() / ideal),
    'effective_share': float(2.0 ** entropy(p) / len(p)),
    'dead_share': float(np.mean(p < DEAD * ideal)),
  }


# --- co-activation


def pair_counts(expert_Nk: np.ndarray, num_experts: int, adjacent: bool = False) -> np.ndarray:
  """int64 [e, e]: tokens that choose both; the diagonal counts tokens that choose the expert.

  Args:
    adjacent: only pairs of neighbouring ranks, as OLMoE's script takes them; both ways.
  """
  e, k = num_experts, expert_Nk.shape[1]
  wide = expert_Nk.astype(np.int64)
  pairs = [(i, j) for i in range(k) for j in range(i + 1, k) if j == i + 1 or not adjacent]
  count = lambda a, b: np.bincount(wide[:, a] * e + wide[:, b], minlength=e * e).reshape(e, e)
  found = sum((count(i, j) for i, j in pairs), np.zeros((e, e), np.int64))
  return found + found.T + np.diag(np.bincount(wide.ravel(), minlength=e))


def coactivation(pairs_ee: np.ndarray) -> np.ndarray:
  """N_ab / N_a off the diagonal, 0 on it.

  Of all pairs (AS_DEFINED) a row sums to k - 1 whatever the router does, so the mean off the
  diagonal is (k - 1) / (E - 1) and tells nothing; of neighbouring ranks (AS_PUBLISHED) the mean
  weighted by N_a is 2 (k - 1) / (k (E - 1)).
  """
  own = np.diag(pairs_ee)
  found = np.divide(pairs_ee, own[:, None], out=np.zeros(pairs_ee.shape), where=own[:, None] > 0)
  np.fill_diagonal(found, 0.0)
  return found


def coactivation_lift(pairs_ee: np.ndarray, tokens: int) -> np.ndarray:
  """(N_ab / N) / ((N_a / N) (N_b / N)); NaN on the diagonal and for unused experts."""
  own = np.diag(pairs_ee).astype(float)
  with np.errstate(divide='ignore', invalid='ignore'):
    found = pairs_ee * tokens / np.outer(own, own)
  np.fill_diagonal(found, np.nan)
  return np.where(np.isfinite(found), found, np.nan)


# --- vocabulary


def specialisation(counts_Ve: np.ndarray, top_k: int, least: int = 1) -> dict[str, float]:
  """How much of a token id goes to its most frequent expert.

  Value of an id: count of that expert / times the id occurs. OLMoE's figure is the unweighted mean
  over ids without a least count (AS_PUBLISHED): an id that is seen once counts 1.0. AS_DEFINED
  leaves out ids with fewer than `least` occurrences and gives both means.

  Returns:
    macro: mean over ids; micro: weighted by occurrences; ids: how many.
  """
  occurrences = counts_Ve.sum(axis=1) / top_k
  kept = occurrences >= least
  if not kept.any():
    return {'macro': float('nan'), 'micro': float('nan'), 'ids': 0}
  value = counts_Ve.max(axis=1)[kept] / occurrences[kept]
  micro = float(np.average(value, weights=occurrences[kept]))
  return {'macro': float(value.mean()), 'micro': micro, 'ids': int(kept.sum())}


def specialisation_of_experts(
  counts_Ve: np.ndarray, top_k: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
  """(mean value of the ids whose most frequent expert it is, how many ids), [e] each."""
  occurrences = counts_Ve.sum(axis=1) / top_k
  kept = occurrences >= least
  best, value = counts_Ve.argmax(axis=1), counts_Ve.max(axis=1) / np.maximum(occurrences, 1)
  e = counts_Ve.shape[1]
  number = np.bincount(best[kept], minlength=e)
  total = np.bincount(best[kept], weights=value[kept], minlength=e)
  return np.divide(total, number, out=np.full(e, np.nan), where=number > 0), number


def agreement_of_pairs(counts_Ve: np.ndarray, top_k: int) -> np.ndarray:
  """Mean |A & B| / k over all pairs of occurrences of an id, [V]; NaN for a single one.

  sum_e n_e (n_e - 1) / (k n (n - 1)): 1 where the choice depends on the id alone.
  """
  n = counts_Ve.sum(axis=1) / top_k
  pairs = top_k * n * (n - 1)
  same = np.sum(counts_Ve * (counts_Ve - 1.0), axis=1)
  return np.divide(same, pairs, out=np.full(len(n), np.nan), where=pairs > 0)


# --- two records of the same tokens


def overlap(a_Nk: np.ndarray, b_Nk: np.ndarray) -> np.ndarray:
  """|A & B| / k of every token; k/E on average for routers that know nothing of each other."""
  return (a_Nk[:, :, None] == b_Nk[:, None, :]).any(axis=2).mean(axis=1)


def profiles(counts_Ve: np.ndarray) -> np.ndarray:
  """P(x | e) - P(x), a row an expert: which ids it gets more of than others do."""
  of_expert = np.nan_to_num(shares(counts_Ve.T.astype(float)))
  return of_expert - shares(counts_Ve.sum(axis=1).astype(float))


def cosine(a_ex: np.ndarray, b_ex: np.ndarray) -> np.ndarray:
  """Cosines of all pairs of rows; 0 where a row is 0."""
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
  return unit(a_ex) @ unit(b_ex).T


def matching(a_ex: np.ndarray, b_ex: np.ndarray) -> tuple[np.ndarray, float, float]:
  """The best one-to-one matching of rows by cosine.

  Returns:
    partner in b of each row of a; mean cosine of the pairs; mean of all pairs (chance).
  """
  from scipy.optimize import linear_sum_assignment

  similar = cosine(a_ex, b_ex)
  rows, columns = linear_sum_assignment(-similar)
  return columns[np.argsort(rows)], float(similar[rows, columns].mean()), float(similar.mean())


# --- chance and intervals


def shuffled(expert_Nk: np.ndarray, generator: np.random.Generator) -> np.ndarray:
  """The same experts with tokens exchanged inside each rank: keeps the load of every rank."""
  order = generator.permuted(np.tile(np.arange(len(expert_Nk)), (expert_Nk.shape[1], 1)), axis=1)
  return np.take_along_axis(expert_Nk, order.T, axis=0)


def interval(
  counts_F: np.ndarray,
  estimate: Callable[[np.ndarray], np.ndarray | float],
  resamples: int = 200,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """95 % by bootstrap over documents.

  Args:
    counts_F: what is counted, [F, ...] by group of documents; up to 64 documents each is a group
      of its own.
    estimate: of the sum over groups.

  Returns:
    The 2.5 and 97.5 percentiles of the estimate.
  """
  groups = len(counts_F)
  draws = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), resamples)
  found = [np.asarray(estimate(np.tensordot(w, counts_F, 1)), float) for w in draws.astype(float)]
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='All-NaN')  # a group that no document has
    low, high = np.nanpercentile(np.stack(found), (2.5, 97.5), axis=0)
  return low, high
