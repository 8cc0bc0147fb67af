"""Experts among themselves: pairs, ways through the layers, the two routers of a block."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from openmoe.atlas import estimators
from openmoe.atlas.analyses.groups import main_router, summed
from openmoe.atlas.attention import BEHAVIOUR
from openmoe.atlas.charts import Analysis, Chart, Heat, Series, Table
from openmoe.atlas.counts import OUT, Key, Study, real
from openmoe.atlas.estimators import AS_DEFINED, AS_PUBLISHED, interval
from openmoe.atlas.record import ATTENTION, MLP, Part

_SHOWN = 16  # experts of a heat map
_POSITION_BINS = 16


def coactivation(study: Study) -> Analysis | None:
  """OLMoE's co-activation as its script counts it and as its formula says."""
  header, k, e = study.header, study.header.top_k, study.header.num_experts
  if k < 2:
    return None
  rows, parts = [], []
  for i, router in enumerate(header.routers):
    pairs = summed(study.pairs(i))
    adjacent = estimators.coactivation(summed(study.pairs(i, adjacent=True)))
    defined = estimators.coactivation(pairs)
    off = ~np.eye(e, dtype=bool)
    used = np.diag(pairs) > 0
    tokens = np.diag(pairs).sum() / k
    lifts = estimators.coactivation_lift(pairs, tokens)
    null = estimators.coactivation(summed(study.pairs(i, null=True)))
    entropies = estimators.entropy(defined[used]) if used.any() else np.array([np.nan])
    rows.append([router, f'{adjacent[off].mean():.2%}', f'{defined[off].mean():.2%}',
                 f'{defined.max():.1%}', f'{null.max():.1%}', f'{entropies.mean():.3f}',
                 f'{np.nanmax(lifts):.2f}' if np.isfinite(lifts).any() else '-'])  # fmt: skip
  i = main_router(study)
  pairs, router = summed(study.pairs(i)), header.routers[i]
  for name, matrix, note in (
    (AS_PUBLISHED, estimators.coactivation(summed(study.pairs(i, adjacent=True))),
     'Only pairs of neighbouring ranks, k - 1 of k (k - 1) / 2, divided by all tokens of the row.'),
    (AS_DEFINED, estimators.coactivation(pairs), 'Tokens that choose both / tokens of the row.'),
  ):  # fmt: skip
    kept = _strongest(matrix)
    parts.append(Heat(f'coactivation_{name}', f'Co-activation, {router}', name, 'expert', 'with',
                      kept.tolist(), kept.tolist(), matrix[np.ix_(kept, kept)],
                      'share of tokens', note))  # fmt: skip
  kept = _strongest(estimators.coactivation(pairs))
  lifts = estimators.coactivation_lift(pairs, np.diag(pairs).sum() / k)[np.ix_(kept, kept)]
  parts.append(Heat('coactivation_lift', f'Lift over independent choices, {router}', AS_DEFINED,
                    'expert', 'with', kept.tolist(), kept.tolist(), lifts, 'lift',
                    'A token cannot choose an expert twice, so some lift below 1 is there by '
                    'construction.', centre=1.0))  # fmt: skip
  head = ('router', 'mean published', 'mean defined', 'largest', 'largest shuffled',
          'row entropy, bits', 'largest lift')  # fmt: skip
  note = f'The mean as defined is always (k-1)/(E-1) = {(k - 1) / (e - 1):.2%}: it says nothing.'
  return Analysis(
    'coactivation',
    'Which experts come together?',
    'N(a, b) / N(a): of the tokens that choose a, how many choose b. The published script counts '
    'only neighbours in rank, which for 8 of 64 random experts gives 2.8 % in place of 11.1 %.',
    'The mean off the diagonal is a constant of k and E if every expert is used; look at the '
    'largest value against the shuffled one, the entropy of rows, and the lift.',
    (Table('coactivation', 'All routers', AS_DEFINED, head, rows, note), *parts),
  )


def _strongest(matrix: np.ndarray) -> np.ndarray:
  """Experts of the strongest pairs, at most _SHOWN, in order."""
  order = np.dstack(np.unravel_index(np.argsort(-matrix, axis=None), matrix.shape))[0]
  kept = list(dict.fromkeys(order.ravel().tolist()))[:_SHOWN]
  return np.array(sorted(kept))


def flow(study: Study) -> Analysis | None:
  """From the experts of a sparse layer to those of the next."""
  header, parts, rows = study.header, [], []
  e = range(study.header.num_experts)
  for kind in dict.fromkeys(router.kind for router in header.routers):
    routers = header.of_kind(kind)
    for a, b in itertools.pairwise(routers):
      told, null, low, high = _between(study, a, b)
      rows.append([header.routers[a], header.routers[b], f'{told["corrected"]:.3f}',
                   f'{low:.3f} to {high:.3f}', f'{null["plug_in"]:.3f}',
                   f'{told["smaller"]:.1%}'])  # fmt: skip
    for a, b in [(routers[0], routers[-1])] if len(routers) > 1 else []:
      for how, name, note in (
        ('same_rank', AS_PUBLISHED, 'Same rank of both layers, as the script pairs them.'),
        ('top1', AS_DEFINED, 'First choice of both layers.'),
      ):
        matrix = estimators.shares(summed(study.between(a, b, how)))
        label = f'{header.routers[a]} to {header.routers[b]}'
        parts.append(Heat(f'flow_{kind}_{name}', f'From {label}', name, str(header.routers[a]),
                          str(header.routers[b]), e, e, matrix, 'P(to | from)', note))  # fmt: skip
  if not rows:
    return None
  head = ('from', 'to', 'information', '95 %', 'shuffled', 'of the smaller H')
  return Analysis(
    'flow',
    'Do tokens travel together through the layers?',
    'Where tokens of an expert go in another layer, and the information between both first '
    'choices in bits, chance subtracted.',
    'Both layers may follow the token id: information between layers is no proof of a circuit.',
    (Table('flow', 'Neighbouring sparse layers', AS_DEFINED, head, rows), *parts),
  )


def _between(
  study: Study, a: int, b: int
) -> tuple[dict[str, float], dict[str, float], float, float]:
  table = study.between(a, b)
  told = estimators.mutual_information(summed(table))
  null = estimators.mutual_information(summed(study.between(a, b, null=True)))
  value = lambda counts: estimators.mutual_information(counts)['corrected']
  low, high = interval(table, value, 100)
  smaller = min(float(estimators.entropy(summed(table).sum(axis=axis))) for axis in (0, 1))
  return told | {'smaller': told['corrected'] / smaller if smaller else 0.0}, null, low, high


def coupling(study: Study) -> Analysis | None:
  """The two routers of a JetMoE block; ours."""
  header = study.header
  layers = [router.layer for router in header.routers if router.kind == ATTENTION]
  if not layers:
    return None
  rows, lines = [], {'attention to MLP, same layer': [], 'MLP to attention of the next': []}
  for layer in layers:
    pairs = [('attention to MLP, same layer', header.router(layer, ATTENTION),
              header.router(layer, MLP))]  # fmt: skip
    if layer + 1 in layers:
      pairs.append(('MLP to attention of the next', header.router(layer, MLP),
                    header.router(layer + 1, ATTENTION)))  # fmt: skip
    for name, a, b in pairs:
      told, null, low, high = _between(study, a, b)
      rows.append([name, header.routers[a], header.routers[b], f'{told["corrected"]:.4f}',
                   f'{low:.4f} to {high:.4f}', f'{null["plug_in"]:.4f}',
                   f'{told["smaller"]:.2%}'])  # fmt: skip
      lines[name].append((layer, told['corrected'], low, high, null['plug_in']))
  series = []
  for name, found in lines.items():
    if found:
      layer, value, low, high, chance = (np.array(x) for x in zip(*found, strict=True))
      series.append(Series(name, layer.tolist(), value, low, high))
      series.append(Series(f'{name}, shuffled', layer.tolist(), chance, chance=True))
  head = ('pair', 'from', 'to', 'information', '95 %', 'shuffled', 'of the smaller H')
  return Analysis(
    'coupling',
    'Do the two routers of a block agree?',
    'Information between the first choices of the attention router and of the MLP router of the '
    'same token, in bits, chance subtracted; and from the MLP router to the next attention router.',
    'Both see the token: what both know of the token id is part of the number.',
    (
      Chart('coupling', 'Information between routers', 'lines', AS_DEFINED, 'layer', 'bits',
            tuple(series)),
      Table('coupling_pairs', 'All pairs', AS_DEFINED, head, rows),
    ),
  )  # fmt: skip


def position_bins(study: Study) -> Key:
  """Positions in some equal parts, 0 left out."""
  length = study.header.length

  def of(part: Part) -> np.ndarray:
    place = np.asarray(part['position']) * _POSITION_BINS // length
    return np.where(real(part), place, OUT)

  return Key('position_bins', tuple(range(_POSITION_BINS)), of)


def layer_profile(study: Study) -> Analysis:
  """How much each layer's routing knows about token, label and position."""
  header = study.header
  keys = {'token id': study.token(), 'position': position_bins(study)}
  keys |= {name: key for name, key in study.labels().items() if key.size > 1}
  parts, rows = [], []
  for kind in dict.fromkeys(router.kind for router in header.routers):
    routers = header.of_kind(kind)
    layers = [header.routers[i].layer for i in routers]
    series = []
    for name, key in keys.items():
      value = lambda counts: estimators.mutual_information(counts)['normalised']
      measured = [value(summed(study.tally(i, key, top=1))) for i in routers]
      limits = [interval(study.tally(i, key, top=1), value, 50) for i in routers]
      null = [value(summed(study.tally(i, key, top=1, null=True))) for i in routers]
      low, high = (np.array([limit[side] for limit in limits]) for side in (0, 1))
      series.append(Series(name, layers, np.array(measured), low, high))
      series.append(Series(f'{name}, shuffled', layers, np.array(null), chance=True))
      rows += [
        [header.routers[i], name, f'{m:.2%}', f'{a:.2%} to {b:.2%}', f'{n:.2%}']
        for i, m, a, b, n in zip(routers, measured, low, high, null, strict=True)
      ]
    parts.append(Chart(f'profile_{kind}', f'Information about the first choice, {kind}', 'lines',
                       AS_DEFINED, 'layer', 'I / H(E)', tuple(series), percent=True,
                       note='Chance subtracted by filled cells (Miller and Madow).'))  # fmt: skip
  head = ('router', 'about', 'I / H(E)', '95 %', 'shuffled')
  return Analysis(
    'profile',
    'What does each layer route by?',
    'Information about the first choice as a share of its entropy: 100 % where the quantity '
    'decides the expert. In other models the curve over depth is U-shaped.',
    'Quantities overlap: a domain tells token ids. Ids that are seen a few times look decided: '
    'what that gives is the shuffled line, to be taken off. Resampled documents repeat, which '
    'pushes intervals up.',
    (*parts, Table('profile', 'All routers', AS_DEFINED, head, rows)),
  )


def attention(study: Study) -> Analysis | None:
  """What the tokens of each attention expert look at; ours."""
  header = study.header
  if 'attention' not in header.columns:
    return None
  routers = header.of_kind(ATTENTION)
  e, b, groups = header.num_experts, len(BEHAVIOUR), study.groups
  shape = (groups, len(routers), e)
  sums, counts = np.zeros((*shape, b)), np.zeros(shape)
  null = np.zeros((*shape, b))
  for number, part in enumerate(study.record.parts()):
    kept = real(part)
    group = part['document'][kept] % groups
    looked = np.asarray(part['attention'][kept], np.float64)
    for place, router in enumerate(routers):
      for shuffled, total in ((False, sums), (True, null)):
        expert = study.experts(part, number, router, shuffled, kept)
        at = (group[:, None], place, expert)
        np.add.at(total, at, looked[:, place])
        if not shuffled:
          np.add.at(counts, at, 1)
  parts = []
  for place in _few(len(routers)):
    router = header.routers[routers[place]]
    for what, name in enumerate(BEHAVIOUR):
      both = np.stack([sums[:, place, :, what], counts[:, place]], axis=1)
      mean: Callable = lambda t: np.divide(t[0], t[1], out=np.full(e, np.nan), where=t[1] > 0)
      low, high = interval(both, mean, 100)
      chance = mean(np.stack([null[:, place, :, what].sum(axis=0), counts[:, place].sum(axis=0)]))
      bars = (Series(name, range(e), mean(both.sum(axis=0)), low, high, counts[:, place].sum(0)),
              Series('shuffled', range(e), chance, chance=True))  # fmt: skip
      parts.append(Chart(f'attention_{name}_{router}', f'{name}, {router}', 'bars', AS_DEFINED,
                         'expert', _UNITS[name], bars))  # fmt: skip
  return Analysis(
    'attention',
    'What does an attention expert look at?',
    'Mean over the choices of each expert, and its heads: distance to the keys in tokens, entropy '
    'in nats, mass on the first position, on the previous token, and on tokens that follow an '
    'earlier copy of the present one (induction). Keys and values are shared by all experts, so '
    'they can be compared directly.',
    "Experts also get other tokens: a difference may be the tokens' and not the expert's.",
    tuple(parts),
  )


_UNITS = {'distance': 'tokens', 'entropy': 'nats'} | dict.fromkeys(
  ('first', 'previous', 'induction'), 'mass'
)


def _few(count: int) -> list[int]:
  return sorted({0, count // 2, count - 1})
