"""Tokens of an expert where they stand: the ones with the largest weights, and some by chance."""

from __future__ import annotations

import dataclasses

import numpy as np

from openmoe.atlas.counts import real
from openmoe.atlas.record import Record

STRONGEST, CHANCE = 8, 8
AROUND = 14  # tokens before and behind


@dataclasses.dataclass(frozen=True)
class Context:
  """A passage around one token.

  Attributes:
    document: its name.
    position: of the token, in its row.
    tokens: ids of the passage.
    weights: of the expert for each of them; 0 where it was not chosen.
    at: place of the token among them.
  """

  document: str
  position: int
  tokens: np.ndarray
  weights: np.ndarray
  at: int


def contexts(record: Record, seed: int = 0) -> list[list[tuple[list[Context], list[Context]]]]:
  """For every router and expert: (strongest, by chance).

  One pass over the record; in memory are the passages that are shown.
  """
  header = record.header
  names = [one['name'] for one in record.describe()]
  kept = [
    [([], []) for _ in range(header.num_experts)] for _ in header.routers
  ]  # of (score, Context)
  for number, part in enumerate(record.parts()):
    chance = np.random.default_rng([seed, number]).random(part.tokens)
    usable = real(part)
    bounds = _rows(np.asarray(part['document']), np.asarray(part['piece']))
    for router in range(len(header.routers)):
      expert, weight = np.asarray(part['expert'][:, router]), np.asarray(part['weight'][:, router])
      for e in range(header.num_experts):
        own = np.where(expert == e, weight, 0).sum(axis=1)
        chosen = (expert == e).any(axis=1) & usable
        places = np.flatnonzero(chosen)
        for list_, score, most in (
          (kept[router][e][0], own, STRONGEST),
          (kept[router][e][1], chance, CHANCE),
        ):
          for i in places[np.argsort(-score[places], kind='stable')[:most]]:
            list_.append((float(score[i]), _passage(part, names, own, bounds, int(i))))
          list_.sort(key=lambda pair: -pair[0])
          del list_[most:]
  plain = lambda pairs: [context for _, context in pairs]
  return [[(plain(a), plain(b)) for a, b in of_router] for of_router in kept]


def _rows(document: np.ndarray, piece: np.ndarray) -> np.ndarray:
  """[N, 2] first token of the row of each token, and the one behind its last."""
  new = np.flatnonzero((np.diff(document) != 0) | (np.diff(piece) != 0)) + 1
  edges = np.concatenate([[0], new, [len(document)]])
  row = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
  return np.stack([edges[row], edges[row + 1]], axis=1)


def _passage(part, names, own: np.ndarray, bounds: np.ndarray, i: int) -> Context:
  first = max(i - AROUND, int(bounds[i, 0]))
  last = min(i + AROUND + 1, int(bounds[i, 1]))
  return Context(
    names[int(part['document'][i])],
    int(part['position'][i]),
    np.array(part['token_id'][first:last]),
    own[first:last].copy(),
    i - first,
  )
