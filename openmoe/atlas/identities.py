"""What holds of every record, whatever the model; a record that breaks one is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np

from openmoe.atlas import estimators
from openmoe.atlas.counts import Study
from openmoe.atlas.record import Part


@dataclasses.dataclass(frozen=True)
class Identity:
  """One statement about a record and how far it is from true.

  Attributes:
    name: the statement.
    worst: largest deviation.
    limit: what rounding allows.
  """

  name: str
  worst: float
  limit: float

  @property
  def holds(self) -> bool:
    return self.worst <= self.limit


def _of_part(part: Part, study: Study) -> dict[str, float]:
  header, count = study.header, lambda wrong: float(np.count_nonzero(wrong))
  expert, slot = np.sort(part['expert'], axis=2), part['slot']
  weight, position = np.asarray(part['weight'], np.float64), part['position']
  lost = np.zeros(slot.shape, bool) if header.capacity is None else slot >= header.capacity
  same_row = (np.diff(part['piece']) == 0) & (np.diff(part['document']) == 0)
  follows = part['next_id'][:-1][same_row] == part['token_id'][1:][same_row]
  found = {
    'the choices of a token are different experts': count(np.diff(expert, axis=2) == 0),
    'combine weights lie in [0, 1]': count((weight < 0) | (weight > 1 + 1e-6)),
    'dropped is a slot beyond the capacity': count(lost != (part['dropped'] > 0)),
    'positions count up in a row': count(np.diff(position)[same_row] != 1),
    'the next token is the next row entry': count(~follows),
  }
  if header.weights_sum_to_one:
    routed = np.asarray(slot >= 0)
    gap = np.where(routed.all(axis=2), np.abs(weight.sum(axis=2) - 1), 0.0)
    found['the weights of a token sum to 1'] = float(gap.max(initial=0))
  if 'probs' in part:
    gap = np.abs(np.asarray(part['probs'], np.float64).sum(axis=2) - 1)
    found['probabilities sum to 1 (in half precision)'] = float(gap.max(initial=0))
  return found


def identities(study: Study) -> list[Identity]:
  """All of them, of all routers."""
  header, limits = study.header, {'the weights': 1e-5, 'probabilities': 5e-3}
  worst: dict[str, float] = {}
  for part in study.record.parts():
    for name, value in _of_part(part, study).items():
      worst[name] = max(worst.get(name, 0.0), value)
  labels = study.labels()
  for router in range(len(header.routers)):
    pairs = study.pairs(router).sum(axis=0)
    used = np.diag(pairs) > 0
    rows = estimators.coactivation(pairs).sum(axis=1)[used]
    gaps = {'sum_b co-activation(a, b) = k - 1': np.abs(rows - (header.top_k - 1)).max()}
    for key in (study.everything(), *labels.values()):
      shares = estimators.shares(study.tally(router, key).sum(axis=0))
      sums = shares[~np.isnan(shares[:, 0])].sum(axis=1)
      gaps['sum_e p_e(g) = 1'] = max(gaps.get('sum_e p_e(g) = 1', 0), np.abs(sums - 1).max())
      domain = np.abs(header.top_k * sums - header.top_k).max()
      name = 'sum_e domain(e, D) = k'
      gaps[name] = max(gaps.get(name, 0), domain)
    for name, gap in gaps.items():
      worst[name] = max(worst.get(name, 0.0), float(gap))
  limit = lambda name: next((x for start, x in limits.items() if name.startswith(start)), 1e-9)
  return [Identity(name, value, limit(name)) for name, value in worst.items()]
