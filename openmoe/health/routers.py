"""What the routers of a step did, as a fixed number of scalars however many experts there are.

Everything per expert or layer stays in arrays (observe/notes.py, router/*.npz).
"""

from __future__ import annotations

import numpy as np

from openmoe.observe.metrics import dead_experts
from openmoe.types import RouterStats


def router_scalars(stats: RouterStats) -> dict[str, float]:
  """Scalars of one step over all layers.

    dropped_fraction, late_dropped_fraction  means over layers; late is the last quarter of the rows
    late_drop_excess    by how much more is dropped there than on the whole
    avoidable_drops     share of the pairs that were dropped while slots stayed empty: what is lost
                        to imbalance, not to a capacity below top_k. The largest of the layers
    expert_usage, router_confidence, tokens_left_behind  means over layers
    expert_load_min, _p10, _p90, _max  of all experts, over a uniform share; 1 is balance
    effective_experts   exp(entropy of the load) / E, the smallest of the layers; 1 is balance
    dead_experts        how many got less than 1 % of a uniform share
    router_logsumexp    root mean square over tokens, the largest of the layers

  Args:
    stats: with a leading l axis, on the host.
  """
  load_le = np.asarray(stats.expert_load_e, np.float64)
  relative_le = load_le * load_le.shape[-1]
  low, p10, p90, high = np.quantile(relative_le, [0.0, 0.1, 0.9, 1.0])
  dropped_l, usage_l = np.asarray(stats.dropped_fraction), np.asarray(stats.expert_usage)
  mean = lambda x: float(np.mean(x))
  return {
    'dropped_fraction': mean(dropped_l),
    'late_dropped_fraction': mean(stats.late_dropped_fraction),
    'late_drop_excess': mean(stats.late_dropped_fraction) - mean(dropped_l),
    'avoidable_drops': float(np.max(avoidable_drops(dropped_l, usage_l))),
    'expert_usage': mean(usage_l),
    'router_confidence': mean(stats.router_confidence),
    'tokens_left_behind': mean(stats.tokens_left_behind),
    'expert_load_min': float(low),
    'expert_load_p10': float(p10),
    'expert_load_p90': float(p90),
    'expert_load_max': float(high),
    'effective_experts': float(np.min(effective_experts(load_le))),
    'dead_experts': float(dead_experts(load_le).sum()),
    'router_logsumexp': float(np.sqrt(np.max(stats.router_z_loss))),
  }


def effective_experts(expert_load: np.ndarray) -> np.ndarray:
  """exp(entropy) / E of loads [..., e] that sum to 1; 1 where all are equal, else less.

  >>> effective_experts(np.array([0.5, 0.5, 0.0, 0.0])).item()
  0.5
  """
  load = np.asarray(expert_load, np.float64)
  logs = np.log(np.where(load > 0, load, 1.0))
  return np.exp(-np.sum(load * logs, axis=-1)) / load.shape[-1]


def avoidable_drops(dropped_fraction: np.ndarray, expert_usage: np.ndarray) -> np.ndarray:
  """dropped_fraction less the part that perfect balance would drop as well.

  Slots per routed pair are (1 - dropped) / usage; where that is under 1, the rest has to go.

  >>> avoidable_drops(np.array([0.375, 0.5]), np.array([1.0, 0.8])).round(3).tolist()
  [0.0, 0.125]
  """
  slots = (1.0 - dropped_fraction) / np.maximum(expert_usage, 1e-9)
  return dropped_fraction - np.maximum(0.0, 1.0 - slots)


class DeadTime:
  """How many steps in a row each expert has been dead."""

  def __init__(self):
    self.steps_le: np.ndarray | None = None

  def add(self, expert_load_le: np.ndarray) -> int:
    """Counts a step; returns the longest of all experts."""
    dead_le = dead_experts(expert_load_le)
    if self.steps_le is None or self.steps_le.shape != dead_le.shape:
      self.steps_le = np.zeros(dead_le.shape, np.int64)
    self.steps_le = np.where(dead_le, self.steps_le + 1, 0)
    return int(self.steps_le.max())
