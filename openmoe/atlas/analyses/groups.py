"""Load, domains, positions, drops, coverage: what share of which tokens an expert gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openmoe.atlas import estimators
from openmoe.atlas.charts import Analysis, Chart, Heat, Series, Table
from openmoe.atlas.counts import Key, Study
from openmoe.atlas.estimators import AS_DEFINED, AS_PUBLISHED, interval, shares

_BINS = 64  # of positions in a picture
PAPER_POSITIONS = (256, 512, 768, 1024, 1280, 1536, 1792)
NEIGHBOURS = (256, 257, 258, 259)


def shown_routers(study: Study, most: int = 3) -> list[int]:
  """Routers whose pictures are drawn: all of a kind, or the first, the middle and the last."""
  found = []
  for kind in dict.fromkeys(router.kind for router in study.header.routers):
    mine = study.header.of_kind(kind)
    places = np.unique(np.linspace(0, len(mine) - 1, most).round().astype(int))
    found += mine if len(mine) <= most else [mine[i] for i in places]
  return found


def main_router(study: Study) -> int:
  """OpenMoE's figures are of its third sparse layer."""
  kind = study.header.routers[-1].kind
  mine = study.header.of_kind(kind)
  return mine[min(2, len(mine) - 1)]


def summed(table_F: np.ndarray) -> np.ndarray:
  return table_F.sum(axis=0)


def share_series(label: str, table_Fe: np.ndarray, scale: float = 1.0) -> Series:
  """Shares of experts with intervals."""
  estimate = lambda counts: scale * shares(counts)
  low, high = interval(table_Fe, estimate)
  value = estimate(summed(table_Fe).astype(float))
  return Series(label, range(len(value)), value, low, high, counts=summed(table_Fe))


def load(study: Study) -> Analysis:
  """How even each router's load is, and the padding scar."""
  header, rows, parts = study.header, [], []
  e = header.num_experts
  scar = lambda counts: _scar(counts, e)
  for i, router in enumerate(header.routers):
    table = study.tally(i, study.everything())[:, 0]
    numbers = estimators.load_numbers(summed(table))
    low, high = interval(table, scar)
    cells = [f'{numbers[n]:.3f}' for n in numbers]
    rows.append([router, *cells, f'{scar(summed(table)):.3f}', f'{low:.3f} to {high:.3f}'])
  for i in shown_routers(study):
    table = study.tally(i, study.everything())[:, 0]
    parts.append(
      Chart(
        f'load_{header.routers[i]}',
        f'Share of all assignments, {header.routers[i]}',
        'bars',
        AS_DEFINED,
        'expert',
        'share',
        (share_series('share', table),),
        (1 / e, 'uniform'),
        f'{summed(table).sum():,} assignments; position 0 left out.',
        percent=True,
      )
    )
  names = ('cv', 'max/mean', 'min/mean', 'exp(H)/E', 'dead share')
  head = ('router', *names, 'experts 0, 1 / others', '95 %')
  padding = 'left out of routing' if header.ignore_padding else 'routed like tokens'
  note = f'Padding was {padding} in this record. 1.0 in the last column but one: no scar.'
  return Analysis(
    'load',
    'How evenly are experts used?',
    'Shares of all assignments before drops. Where padding was routed in training it went to '
    'experts 0 and 1, so a share of these two far under 1 is what a router that keeps real tokens '
    'away from them looks like.',
    'An even load says nothing about specialisation: a router that ignores its input is even too.',
    (Table('load', 'Every router', AS_DEFINED, head, rows, note), *parts),
  )


def _scar(counts_e: np.ndarray, e: int) -> float:
  """Mean load of experts 0 and 1 over that of the others."""
  rest = counts_e[2:].mean() if e > 2 else np.nan
  return float(counts_e[:2].mean() / rest) if rest else float('nan')


def by_label(study: Study) -> Analysis | None:
  """Radar plots of OpenMoE's figures 5 to 8 and OLMoE's domain specialisation."""
  parts = [part for key in study.labels().values() for part in _of_label(study, key)]
  if not parts:
    return None
  return Analysis(
    'groups',
    'Do experts prefer a domain, a language, a source?',
    "Each polygon is p_e(g), the share of a group's assignments that goes to expert e. The bars "
    'are k p_e(g) = N(e, D) / N(D) as OLMoE defines it. Dashed: all tokens together, which is what '
    'shuffling experts over tokens gives. The table has the information of the group in bits.',
    'A polygon that differs from the dashed one may only reflect that the groups have other '
    'tokens: compare with the information of the token id in the layer profile.',
    tuple(parts),
  )


def _of_label(study: Study, key: Key) -> list[Chart | Table]:
  header, k, found, rows = study.header, study.header.top_k, [], []
  for i in range(len(header.routers)):
    best = study.tally(i, key, top=1)
    told = estimators.mutual_information(summed(best))
    null = estimators.mutual_information(summed(study.tally(i, key, top=1, null=True)))
    value = lambda counts: estimators.mutual_information(counts)['corrected']
    low, high = interval(best, value, 100)
    strongest = np.nan_to_num(estimators.lift(summed(study.tally(i, key)))).max()
    rows.append([header.routers[i], *(f'{told[n]:.4f}' for n in ('plug_in', 'corrected')),
                 f'{low:.4f} to {high:.4f}', f'{null["plug_in"]:.4f}',
                 f'{told["normalised"]:.2%}', f'{strongest:.2f}'])  # fmt: skip
  head = ('router', 'I plug-in', 'I corrected', '95 %', 'I shuffled', 'I / H(E)', 'largest lift')
  note = 'Bits, of the first choice. Largest lift over pairs with at least 20 assignments.'
  title = f'Information between {key.name} and expert'
  found.append(Table(f'{key.name}_information', title, AS_DEFINED, head, rows, note))
  for i in shown_routers(study):
    table, router = study.tally(i, key), header.routers[i]
    overall = shares(summed(study.tally(i, study.everything()))[0])
    chance = Series('all tokens', range(header.num_experts), overall, chance=True)
    polygons = [share_series(name, table[:, g]) for g, name in enumerate(key.labels)][:12]
    bars = [share_series(name, table[:, g], k) for g, name in enumerate(key.labels)][:8]
    sizes = ', '.join(f'{n} {c:,}' for n, c in zip(key.labels, summed(table).sum(axis=1),
                                                    strict=True))  # fmt: skip
    note = f'Assignments: {sizes}.'
    shared = ('expert', 'share')
    found += [
      Chart(f'{key.name}_{router}', f'Routing by {key.name}, {router}', 'radar', AS_PUBLISHED,
            *shared, (*polygons, chance), note=note, percent=True),
      Chart(f'{key.name}_bars_{router}', f'N(e, D) / N(D) by {key.name}, {router}', 'bars',
            AS_DEFINED, *shared, tuple(bars), (k / header.num_experts, 'k/E'), note, percent=True),
    ]  # fmt: skip
  return found


def _binned(length: int) -> np.ndarray:
  """Bin of each position; position 0 has one of its own."""
  bins = 1 + (np.arange(length) - 1) * (_BINS - 1) // max(1, length - 1)
  bins[0] = 0
  return bins if length > _BINS else np.arange(length)


def positions(study: Study) -> Analysis:
  """OpenMoE's figures 9a, 9b and 13, with effective experts."""
  header, parts = study.header, []
  key = study.position()
  for i in shown_routers(study):
    router = header.routers[i]
    table, null = study.tally(i, key), summed(study.tally(i, key, null=True))
    counts = summed(table)
    reached = counts.sum(axis=1) > 0
    place = np.flatnonzero(reached)
    low, high = interval(table, estimators.sigma, 100)
    measured = estimators.sigma(counts)
    at = tuple(int(p) for p in place)
    lines = (
      Series('measured', at, measured[reached], low[reached], high[reached],
             counts.sum(axis=1)[reached]),
      Series('shuffled', at, estimators.sigma(null)[reached], chance=True),
    )  # fmt: skip
    tokens = counts.sum(axis=1)[reached] / header.top_k
    note = f'Tokens at a position: {tokens.max():,.0f} at first, {tokens.min():,.0f} at the end.'
    parts.append(Chart(f'position_sigma_{router}', f'Spread over experts, {router}', 'lines',
                       AS_PUBLISHED, 'position', 'sigma', lines, note=note))  # fmt: skip
    wanted = [p for p in PAPER_POSITIONS if p < len(reached) and reached[p]]
    if len(wanted) < 3:
      wanted = sorted({int(p) for p in np.linspace(1, place[-1], 7)} & set(at))
    close = [p for p in NEIGHBOURS if p < len(reached) and reached[p]]
    for name, chosen in (('apart', wanted), ('neighbours', close)):
      if len(chosen) > 1:
        polygons = tuple(share_series(f'position {p}', table[:, p]) for p in chosen)
        parts.append(Chart(f'position_{name}_{router}', f'Positions, {name}, {router}', 'radar',
                           AS_PUBLISHED, 'expert', 'share', polygons, note=note,
                           percent=True))  # fmt: skip
    first, rest = (estimators.effective_experts(c) for c in (counts[0], counts[1:].sum(axis=0)))
    cells = [['position 0', f'{first:.2f}'], ['all others together', f'{rest:.2f}']]
    parts.append(Table(f'position_effective_{router}', f'Effective experts, {router}', AS_DEFINED,
                       ('tokens', 'N_eff'), cells,
                       '1 / sum p^2. Every row begins with the same token.'))  # fmt: skip
  return Analysis(
    'positions',
    'Does the position decide?',
    'sigma is the standard deviation of p_e over experts at one position: 0 for uniform. Few '
    'tokens at a position raise it by chance alone, which the shuffled line shows.',
    'Position 0 holds the same token in every row, so its height is that of a token id.',
    tuple(parts),
  )


def drops(study: Study) -> Analysis | None:
  """OpenMoE's figure 12: what finds no slot, by position."""
  header = study.header
  if header.capacity is None:
    return None
  keys = study.labels() or {'all': study.everything()}
  key = next(iter(keys.values()))
  bins, parts = _binned(header.length), []
  for i in shown_routers(study):
    table = study.drops(i, key)
    binned = np.zeros((*table.shape[:2], bins.max() + 1, 2))
    np.add.at(binned, (slice(None), slice(None), bins), table)
    lines = []
    for g, name in enumerate(key.labels):
      reached = binned[:, g].sum(axis=0)[:, 1] > 0
      ratio = lambda c: np.divide(c[:, 0], c[:, 1], out=np.full(len(c), np.nan), where=c[:, 1] > 0)
      low, high = interval(binned[:, g], ratio, 100)
      total = binned[:, g].sum(axis=0)
      x = np.array([np.flatnonzero(bins == b).mean() for b in range(bins.max() + 1)])
      lines.append(Series(name, x[reached].tolist(), ratio(total)[reached], low[reached],
                          high[reached], total[reached, 1]))  # fmt: skip
    overall = table.sum(axis=(0, 1, 2))
    note = (
      f'{overall[0]:,} of {overall[1]:,} assignments dropped. Groups of {header.group_size} '
      f'tokens, {header.capacity} slots an expert (factor {header.capacity_factor}); padding is '
      f'{"left out" if header.ignore_padding else "routed and takes slots"}. Least count of a '
      f'point: {min(s.counts.min() for s in lines):,.0f} assignments.'
    )
    parts.append(Chart(f'drops_{header.routers[i]}', f'Dropped by position, {header.routers[i]}',
                       'lines', AS_DEFINED, 'position', 'dropped', tuple(lines), note=note,
                       percent=True))  # fmt: skip
  return Analysis(
    'drops',
    'Who finds no slot?',
    'Slots go in the order of tokens, first choices before second ones, so an expert that is '
    'wanted often is full towards the end of its group.',
    'The figure depends on the size of the groups, on who shares a group and on padding; with '
    'other batches it is another figure. Late positions are reached by few rows: see the counts.',
    tuple(parts),
  )


def coverage(study: Study) -> Analysis | None:
  """Share of a group's traffic that its own top experts take."""
  labels = study.labels()
  if not labels:
    return None
  header, parts, e = study.header, [], study.header.num_experts
  key = next(iter(labels.values()))
  for i in shown_routers(study):
    table = study.tally(i, key)
    lines = []
    for g, name in enumerate(key.labels):
      lines.append(_coverage_of(name, table[:, g]))
    x = range(1, e + 1)
    chance = Series('N / E', x, np.arange(1, e + 1) / e, chance=True)
    parts.append(Chart(f'coverage_{header.routers[i]}', f'Traffic of the top experts of a '
                       f'{key.name}, {header.routers[i]}', 'lines', AS_DEFINED, 'experts N',
                       'share of traffic', (*lines, chance), percent=True,
                       note='Experts are chosen on every other group of documents and measured '
                            'on the rest.'))  # fmt: skip
  return Analysis(
    'coverage',
    'How few experts would a domain need?',
    'Share of the assignments of a group that go to its N most used experts.',
    'Traffic is not need: what a ban of the others costs is measured by `intervene`.',
    tuple(parts),
  )


def _coverage_of(name: str, table_Fe: np.ndarray) -> Series:
  chosen, measured = (table_Fe[0::2], table_Fe[1::2]) if len(table_Fe) > 1 else (table_Fe,) * 2
  order = np.argsort(-chosen.sum(axis=0))
  curve = lambda counts: np.cumsum(shares(counts)[order])
  low, high = interval(measured, curve, 100)
  value = curve(measured.sum(axis=0).astype(float))
  return Series(name, range(1, len(order) + 1), value, low, high)


def balance(study: Study) -> Analysis | None:
  """Balance per group of tokens and the soft information; needs all probabilities."""
  if 'probs' not in study.header.columns:
    return None
  header, e, k = study.header, study.header.num_experts, study.header.top_k
  keys = [study.everything(), *study.labels().values()]
  rows = []
  for key in keys:
    sums, tokens = study.mean_by(key, 'probs')
    entropies, _ = study.mean_by(key, 'entropy')
    for g, name in enumerate(key.labels):
      n = tokens[:, g].sum()
      if not n:
        continue
      mean_Re = sums[:, g].sum(axis=0) / n
      tallies = np.stack([summed(study.tally(i, key))[g] for i in range(len(header.routers))])
      loss = float(np.mean(e * np.sum(tallies / n * mean_Re, axis=1)))
      soft = estimators.entropy(mean_Re) - entropies[:, g].sum(axis=0) / n / np.log(2)
      rows.append([key.name, name, f'{n:,.0f}', f'{loss:.3f}', f'{loss / k:.3f}',
                   *_range(soft)])  # fmt: skip
  head = ('by', 'group', 'tokens', 'E sum f P', '/ k', 'MI soft: least', 'mean', 'most')
  note = f'{k} (or 1 over k) at balance. MI soft = H(mean P) - mean H(P), bits, over routers.'
  parts: list[Chart | Heat | Table] = [
    Table('balance', 'Balance of groups', AS_DEFINED, head, rows, note)
  ]
  return Analysis(
    'balance',
    'Is each domain balanced by itself?',
    "The balance loss of OLMoE's script per group of tokens, mean over routers, and the "
    'information that a token has about the expert by the probabilities and not the choices.',
    'Balance over all tokens does not ask for balance in each group: a group above k is where '
    'specialisation would show.',
    tuple(parts),
  )


def _range(values: Sequence[float]) -> list[str]:
  return [f'{f(values):.4f}' for f in (np.min, np.mean, np.max)]
