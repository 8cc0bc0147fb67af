"""Planted routers, written as records, and records of tiny models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from openmoe.atlas.counts import Study
from openmoe.atlas.record import COLUMNS, MLP, OPTIONAL, Document, Header, Record, RouterId, Writer

Router = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (token ids, positions) -> [N, k] experts


def documents(count=40, tokens=100, vocab=50, seed=0, skew=1.0) -> list[Document]:
  """Random texts with labels; ids from 1 on, frequencies like 1 / rank ** skew."""
  generator = np.random.default_rng(seed)
  p = 1 / np.arange(1, vocab) ** skew
  names = ('code', 'prose')
  return [
    Document(f'd{i}', generator.choice(np.arange(1, vocab), tokens, p=p / p.sum()).tolist(),
             {'source': names[i % 2], 'domain': 'abcd'[i % 4]})
    for i in range(count)
  ]  # fmt: skip


def planted(
  folder,
  routers: Sequence[Router],
  *,
  experts=32,
  k=2,
  vocab=50,
  texts=None,
  capacity=None,
  group=None,
  kinds=None,
  step=None,
  checkpoint='planted',
) -> Study:
  """A record of routers that are functions of token and position.

  Args:
    capacity, group: slots in order of tokens, first choices of a group before second ones.
  """
  texts = documents(vocab=vocab) if texts is None else texts
  kinds = kinds or [(i, MLP) for i in range(len(routers))]
  header = Header(
    model='planted', checkpoint=checkpoint, vocab_size=vocab, num_experts=experts, top_k=k,
    routers=tuple(RouterId(*kind) for kind in kinds), tokenizer='t',
    length=max(len(d.tokens) for d in texts) + 1, rows=1, dtype='float32', dispatch='dropless',
    group_size=group, capacity=capacity, step=step,
    columns=tuple(c for c in COLUMNS if c not in OPTIONAL),
  )  # fmt: skip
  writer = Writer(folder, header)
  for number, text in enumerate(texts):
    writer.digest(text)
    token = np.array([0, *text.tokens])
    n, r = len(token), len(routers)
    position = np.arange(n)
    expert = np.stack([router(token, position) for router in routers], axis=1)
    slot = np.zeros((n, r, k), int)
    if capacity is not None:
      for i in range(r):
        slot[:, i] = slots(expert[:, i], group or n)
    zeros = np.zeros((n, r))
    writer.add(text, {
      'document': np.full(n, number), 'piece': np.zeros(n, int), 'position': position,
      'token_id': token, 'next_id': np.append(token[1:], -1), 'predicted_id': token,
      'next_log_prob': np.zeros(n), 'expert': expert, 'weight': np.full((n, r, k), 1 / k),
      'slot': slot, 'dropped': slot >= (n if capacity is None else capacity),
      'lse': zeros, 'entropy': zeros, 'margin': zeros,
    })  # fmt: skip
  writer.finish({i: f' w{i}' for i in range(vocab)})
  return Study(Record(folder))


def slots(expert_Nk: np.ndarray, group: int) -> np.ndarray:
  """Slots by a plain loop: in a group, all first choices before any second."""
  slot = np.zeros(expert_Nk.shape, int)
  for begin in range(0, len(expert_Nk), group):
    taken: dict[int, int] = {}
    for rank in range(expert_Nk.shape[1]):
      for i in range(begin, min(begin + group, len(expert_Nk))):
        expert = expert_Nk[i, rank]
        slot[i, rank] = taken.get(expert, 0)
        taken[expert] = slot[i, rank] + 1
  return slot


def by_token(experts=32, vocab=50, seed=3) -> Router:
  """Two fixed experts for each id."""
  generator = np.random.default_rng(seed)
  table = np.stack([generator.permutation(experts)[:2] for _ in range(vocab)])
  return lambda token, position: table[token]


def by_position(experts=32) -> Router:
  return lambda token, position: np.stack([position % experts, (position + 1) % experts], axis=1)


def uniform(experts=64, k=8, seed=0) -> Router:
  """k different experts by chance."""
  generator = np.random.default_rng(seed)
  return lambda token, position: np.argsort(generator.random((len(token), experts)), axis=1)[:, :k]
