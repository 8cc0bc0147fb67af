"""Several records of the same tokens: checkpoints of one run, or two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from openmoe.atlas import estimators
from openmoe.atlas.analyses.groups import main_router, share_series, summed
from openmoe.atlas.analyses.tokens import chosen_ids, text_of
from openmoe.atlas.charts import Analysis, Chart, Heat, Series, Table
from openmoe.atlas.counts import Study, real
from openmoe.atlas.estimators import AS_DEFINED, AS_PUBLISHED, interval
from openmoe.config import ConfigError

_EARLY = ('ed', 'an')


def check_same(studies: Sequence[Study], routers: bool = True) -> None:
  """Raises ConfigError unless all records are of the same tokens, and of routers that compare."""
  first = studies[0]
  for other in studies[1:]:
    differing = [
      name for name in ('length', 'tokenizer', 'start_id')
      if getattr(first.header, name) != getattr(other.header, name)
    ]  # fmt: skip
    if first.record.data != other.record.data:
      differing.append('documents')
    if routers:
      differing += [
        name for name in ('routers', 'num_experts', 'top_k')
        if getattr(first.header, name) != getattr(other.header, name)
      ]  # fmt: skip
    if differing:
      raise ConfigError(
        f'{first.record.folder} and {other.record.folder} have other {", ".join(differing)}; '
        'record the same data in the same way.'
      )


def by_training(studies: Sequence[Study]) -> list[Study]:
  """In order of tokens seen, or of steps; as given where one does not say."""
  for name in ('tokens_seen', 'step'):
    values = [getattr(study.header, name) for study in studies]
    if None not in values and len(set(values)) == len(values):
      return sorted(studies, key=lambda study: getattr(study.header, name))
  return list(studies)


def _when(study: Study) -> str:
  header = study.header
  return f'step {header.step}' if header.step is not None else study.record.name


def _x_axis(studies: Sequence[Study]) -> tuple[str, list[float]]:
  for name, label in (('tokens_seen', 'tokens seen'), ('step', 'step')):
    values = [getattr(study.header, name) for study in studies]
    if None not in values:
      return label, [float(value) for value in values]
  return 'checkpoint', [float(i) for i in range(len(studies))]


def aligned(one: Study, other: Study, router: int) -> Iterator[tuple[np.ndarray, ...]]:
  """(document, experts of one, of the other) of the same tokens, part by part of the first."""
  theirs = ((p['document'], p['expert'], p['position']) for p in other.record.parts())
  waiting = [np.zeros(0, np.int64), None]
  for part in one.record.parts():
    need = part.tokens
    while len(waiting[0]) < need:
      document, expert, _ = next(theirs)
      mine = np.asarray(expert[:, router])
      waiting = [
        np.concatenate([waiting[0], document]),
        mine if waiting[1] is None else np.concatenate([waiting[1], mine]),
      ]
    kept = real(part)
    yield (
      np.asarray(part['document'])[kept],
      np.asarray(part['expert'][:, router])[kept],
      waiting[1][:need][kept],
    )
    waiting = [waiting[0][need:], waiting[1][need:]]


def saturation_of(one: Study, final: Study, router: int) -> np.ndarray:
  """[F, 3]: sums of top-1 agreement and of |A & B| / k, and tokens."""
  total = np.zeros((one.groups, 3))
  for document, a, b in aligned(one, final, router):
    values = np.stack([a[:, 0] == b[:, 0], estimators.overlap(a, b), np.ones(len(a))], axis=1)
    np.add.at(total, document % one.groups, values)
  return total


def saturation(studies: list[Study]) -> Analysis:
  """OLMoE's router saturation against the last checkpoint."""
  check_same(studies)
  studies = by_training(studies)
  header, final = studies[-1].header, studies[-1]
  label, x = _x_axis(studies[:-1])
  parts, rows = [], []
  e, k = header.num_experts, header.top_k
  for what, name, floor in ((0, 'top-1', 1 / e), (1, f'top-{k}', k / e)):
    lines = []
    for i, router in enumerate(header.routers):
      tables = [saturation_of(study, final, i) for study in studies[:-1]]
      mean = lambda t, what=what: t[what] / t[2]
      value = np.array([mean(t.sum(axis=0)) for t in tables])
      limits = [interval(t, mean, 100) for t in tables]
      low, high = (np.array([limit[side] for limit in limits], float) for side in (0, 1))
      lines.append(Series(str(router), x, value, low, high))
      rows += [
        [_when(s), router, name, f'{v:.2%}', f'{a:.2%} to {b:.2%}']
        for s, v, a, b in zip(studies[:-1], value, low, high, strict=True)
      ]
    parts.append(Chart(f'saturation_{name}', f'Router saturation, {name}', 'lines', AS_DEFINED,
                       label, '|A & B| / k', tuple(lines), (floor, 'random routers'),
                       f'Against {_when(final)}, {final.record.tokens:,} tokens.',
                       percent=True))  # fmt: skip
  head = ('checkpoint', 'router', 'choices', 'saturation', '95 %')
  return Analysis(
    'saturation',
    'How early does routing settle?',
    "Share of a token's experts that are already those of the last checkpoint.",
    'Loads alone make two routers agree: the dashed line is for even loads, uneven ones agree '
    'more. Experts keep their numbers within a run only.',
    (*parts, Table('saturation', 'All', AS_DEFINED, head, rows)),
  )


def early(studies: list[Study]) -> Analysis:
  """OpenMoE's figure 11: the same tokens at several checkpoints."""
  check_same(studies)
  studies = by_training(studies)
  first = studies[-1]
  i = main_router(first)
  texts = {first.record.pieces.get(int(t), '').strip(): p for p, t in enumerate(first.ids)}
  places = [texts[text] for text in _EARLY if text in texts] or chosen_ids(first, 2)
  parts = []
  for number, place in enumerate(places):
    token = int(first.ids[place])
    lines = []
    for study in studies:
      table = study.tally(i, study.token())[:, int(np.searchsorted(study.ids, token))]
      lines.append(share_series(_when(study), table))
    title = f'Token {text_of(first, token)}, {first.header.routers[i]}'
    parts.append(Chart(f'early_{number}', title, 'radar', AS_PUBLISHED, 'expert', 'share',
                       tuple(lines), note=f'{first.times[place]:,} occurrences.',
                       percent=True))  # fmt: skip
  return Analysis(
    'early',
    'When does a token get its experts?',
    'The share of each expert for one token id at several checkpoints: polygons that lie on one '
    'another were settled early.',
    'A few tokens of the figure are no measure; the saturation is.',
    tuple(parts),
  )


def _profiles(study: Study, router: int) -> np.ndarray:
  """[e, V] centred, V the whole vocabulary."""
  counts = summed(study.tally(router, study.token()))
  whole = np.zeros((study.header.vocab_size, counts.shape[1]))
  whole[study.ids] = counts
  return estimators.profiles(whole)


def stability(studies: list[Study]) -> Analysis:
  """Cosine of each expert's profile of token ids with that of the last checkpoint."""
  check_same(studies)
  studies = by_training(studies)
  header, final = studies[-1].header, studies[-1]
  label, x = _x_axis(studies[:-1])
  lines, levels = [], []
  for i, router in enumerate(header.routers):
    last = _profiles(final, i)
    found = [estimators.cosine(_profiles(study, i), last) for study in studies[:-1]]
    lines.append(Series(str(router), x, np.array([np.diag(c).mean() for c in found])))
    levels += [float(c.mean()) for c in found]
  return Analysis(
    'stability',
    'Does an expert keep its tokens?',
    'Cosine of P(x | e) - P(x) with that of the same expert in the last checkpoint, mean over '
    'experts. The dashed line is the mean of all pairs of experts.',
    'Profiles are dominated by frequent ids.',
    (
      Chart('stability', f'Profiles against {_when(final)}', 'lines', AS_DEFINED, label, 'cosine',
            tuple(lines), (float(np.mean(levels)), 'all pairs')),
    ),
  )  # fmt: skip


def matching(studies: list[Study]) -> Analysis:
  """Experts of two models matched by their profiles; needed wherever two seeds are compared."""
  check_same(studies)
  one, other = studies[0], studies[-1]
  header, rows, parts = one.header, [], []
  for i, router in enumerate(header.routers):
    a, b = _profiles(one, i), _profiles(other, i)
    partner, matched, chance = estimators.matching(a, b)
    own = float(np.diag(estimators.cosine(a, b)).mean())
    moved = int((partner != np.arange(len(partner))).sum())
    rows.append([router, f'{matched:.3f}', f'{own:.3f}', f'{chance:.3f}',
                 f'{moved} of {len(partner)}'])  # fmt: skip
    if i == main_router(one):
      order = np.arange(header.num_experts)
      parts.append(Heat('matching', f'Cosine of profiles, {router}', AS_DEFINED,
                        one.record.name, other.record.name, order, partner.tolist(),
                        estimators.cosine(a, b)[:, partner], 'cosine',
                        'Columns in the order of the best matching.', centre=0.0))  # fmt: skip
  head = ('router', 'matched', 'same number', 'all pairs', 'other number')
  return Analysis(
    'matching',
    'Which expert here is which expert there?',
    'The one-to-one matching of experts with the largest sum of cosines of their token profiles '
    '(Hungarian), beside experts of the same number and the mean of all pairs, which is chance.',
    'A matching is found for any two models: it means something where it is far above chance.',
    (Table('matching_routers', 'All routers', AS_DEFINED, head, rows), *parts),
  )


def difference(studies: list[Study]) -> Analysis:
  """Two records side by side: loss, load, agreement, drops."""
  check_same(studies)
  one, other = studies[0], studies[-1]
  header, rows, parts = one.header, [], []
  for i, router in enumerate(header.routers):
    table = saturation_of(one, other, i)
    numbers = [estimators.load_numbers(summed(s.tally(i, s.everything()))[0]) for s in (one, other)]
    mean = lambda t: t[1] / t[2]
    low, high = interval(table, mean, 100)
    rows.append([router, f'{mean(table.sum(axis=0)):.2%}', f'{low:.2%} to {high:.2%}',
                 *(f'{n["cv"]:.3f}' for n in numbers)])  # fmt: skip
  for i in dict.fromkeys((0, main_router(one))):
    bars = tuple(
      share_series(name, study.tally(i, study.everything())[:, 0])
      for name, study in zip(names_of(studies), studies, strict=True)
    )
    parts.append(Chart(f'difference_load_{header.routers[i]}', f'Load, {header.routers[i]}', 'bars',
                       AS_DEFINED, 'expert', 'share', bars,
                       (1 / header.num_experts, 'uniform'), percent=True))  # fmt: skip
  losses = [loss_table(study) for study in studies]
  cells = []
  for name, table in zip(names_of(studies), losses, strict=True):
    value = lambda t: t[0] / t[1]
    low, high = interval(table, value)
    cells.append([name, f'{value(table.sum(axis=0)):.4f}', f'{low:.4f} to {high:.4f}'])
  paired = np.concatenate([losses[0], losses[-1]], axis=1)
  change = lambda t: t[2] / t[3] - t[0] / t[1]
  low, high = interval(paired, change)
  cells.append(['second - first', f'{change(paired.sum(axis=0)):+.4f}',
                f'{low:+.4f} to {high:+.4f}'])  # fmt: skip
  head = ('router', 'same experts', '95 %', 'cv of the first', 'cv of the second')
  return Analysis(
    'difference',
    'What is different between two records?',
    'Loss of the same tokens, paired by document; share of a token\'s experts that are the same; '
    'loads side by side.',
    'Experts of two seeds have other numbers for the same work: see the matching.',
    (Table('difference_loss', 'Loss, nats per token', AS_DEFINED, ('record', 'loss', '95 %'),
           cells),
     Table('difference', 'Routers', AS_DEFINED, head, rows), *parts),
  )  # fmt: skip


def names_of(studies: Sequence[Study]) -> list[str]:
  """Names of records, told apart by their folder where they are the same."""
  names = [study.record.name for study in studies]
  if len(set(names)) < len(names):
    return [f'{name} ({s.record.folder.name})' for name, s in zip(names, studies, strict=True)]
  return names


def loss_table(study: Study, key=None) -> np.ndarray:
  """[F, 2] (or [F, groups, 2] by key): sum of the losses of next tokens, and their count."""
  key = key or study.everything()
  total = np.zeros((study.groups * key.size, 2))
  for part in study.record.parts():
    group = key.of(part)
    kept = (group >= 0) & (part['next_id'] >= 0)
    place = part['document'][kept] % study.groups * key.size + group[kept]
    total[:, 0] += np.bincount(place, -part['next_log_prob'][kept].astype(float), len(total))
    total[:, 1] += np.bincount(place, minlength=len(total))
  found = total.reshape(study.groups, key.size, 2)
  return found[:, 0] if key.size == 1 else found
