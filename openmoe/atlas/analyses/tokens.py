"""Token ids: which experts they take, whether the context changes that, and what experts like."""

from __future__ import annotations

import math
import re

import numpy as np

from openmoe.atlas import estimators
from openmoe.atlas.analyses.groups import main_router, share_series, shown_routers, summed
from openmoe.atlas.charts import Analysis, Chart, Heat, Series, Table
from openmoe.atlas.counts import OUT, Key, Study
from openmoe.atlas.estimators import AS_DEFINED, AS_PUBLISHED, interval
from openmoe.atlas.record import Part

LEAST = 128  # occurrences, of OpenMoE's figure 14
LEAST_LISTED = 10  # of OLMoE's lists
LEAST_PAIR = 20  # assignments, of a lift
_LISTED = 10  # ids of an expert
_FREQUENT = 512  # ids whose pairs with the token before are counted
KEYINGS = {'token_id': 'input id', 'predicted_id': 'predicted id', 'next_id': 'true next id'}
# As in the paper's figure 10, where the vocabulary has them.
_PAPER = ('.', ',', '1', '2', 'a', 'an', 'ed')


def text_of(study: Study, token: int) -> str:
  """A token as it is shown in tables: spaces and line ends visible."""
  text = study.record.pieces.get(token, f'<{token}>')
  return text.replace(' ', '␣').replace('\n', '⏎').replace('\t', '⇥')


def chosen_ids(study: Study, most: int = 7) -> list[int]:
  """Places in study.ids of the paper's tokens, or of the most frequent ones."""
  texts = {study.record.pieces.get(int(token), '').strip(): i for i, token in enumerate(study.ids)}
  found = [texts[text] for text in _PAPER if text in texts and study.times[texts[text]] >= LEAST]
  frequent = [int(i) for i in np.argsort(-study.times) if int(i) not in found]
  return (found + frequent)[:most] if len(found) < 3 else found[:most]


def bigrams(study: Study, give_previous: bool) -> Key:
  """Frequent ids, by themselves or each with the (frequent) id before it."""
  frequent = np.sort(study.ids[np.argsort(-study.times)[:_FREQUENT]])
  n = len(frequent)

  def place(ids: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(frequent, ids), n - 1)
    return np.where(frequent[at] == ids, at, OUT)

  def of(part: Part) -> np.ndarray:
    own = place(np.asarray(part['token_id']))
    before = np.concatenate([[OUT], own[:-1]])
    usable = (part['position'] > 1) & (own >= 0) & (before >= 0)
    return np.where(usable, before * n + own if give_previous else own, OUT)

  labels = range(n * n) if give_previous else range(n)
  return Key(f'bigram_{give_previous}', tuple(labels), of)


def token_ids(study: Study) -> Analysis:
  """OpenMoE's figures 10 and 14, again with the previous token given."""
  header, parts, rows = study.header, [], []
  key = study.token()
  shown = shown_routers(study)
  for i in range(len(header.routers)):
    router = header.routers[i]
    table, null = study.tally(i, key), summed(study.tally(i, key, null=True))
    counts = summed(table)
    often = study.times >= LEAST
    pairs = summed(study.tally(i, bigrams(study, True)))
    pairs = pairs[pairs.sum(axis=1) / header.top_k >= LEAST]
    for name, found in (('token id', counts[often]), ('previous and token', pairs),
                        ('token id, shuffled', null[often])):  # fmt: skip
      if len(found):
        rows.append([router, name, len(found), *_macro_micro(found)])
    if i not in shown or not often.any():
      continue
    ids = study.ids[often].tolist()
    dots = (Series('an id', ids, estimators.sigma(counts[often]), counts=study.times[often]),
            Series('shuffled', ids, estimators.sigma(null[often]), chance=True))  # fmt: skip
    note = f'{often.sum()} ids with at least {LEAST} occurrences of {len(often)}.'
    parts.append(Chart(f'token_sigma_{router}', f'Spread over experts by token id, {router}',
                       'dots', AS_PUBLISHED, 'token id', 'sigma', dots, note=note))  # fmt: skip
    places = chosen_ids(study)
    polygons = tuple(
      share_series(text_of(study, int(study.ids[p])), table[:, p]) for p in places
    )  # fmt: skip
    parts.append(Chart(f'tokens_{router}', f'Some tokens, {router}', 'radar', AS_PUBLISHED,
                       'expert', 'share', polygons, percent=True))  # fmt: skip
  head = ('router', 'group', 'groups', 'sigma macro', 'sigma micro', 'N_eff macro', 'N_eff micro')
  note = f'Groups with at least {LEAST} occurrences; macro: mean over groups, micro: by tokens.'
  table = Table('token_spread', 'Spread by token id', AS_DEFINED, head, rows, note)
  return Analysis(
    'token_ids',
    'Does the token id decide?',
    'sigma of an id: 0 where it goes everywhere, 0.121 where it takes two of 32 experts always. '
    'If the rows with the previous token given are hardly higher, the id decides and not its '
    'context.',
    'Rare ids are left out, because a few occurrences concentrate by chance: the shuffled rows '
    'show what is left of that. The first attention router of a JetMoE sees the embedding alone, '
    'so there the id decides by construction.',
    (table, *parts),
  )


def _macro_micro(counts: np.ndarray) -> list[str]:
  spread, weights = estimators.sigma(counts), counts.sum(axis=1)
  effective = estimators.effective_experts(counts)
  values = (spread.mean(), np.average(spread, weights=weights),
            effective.mean(), np.average(effective, weights=weights))  # fmt: skip
  return [f'{value:.4f}' for value in values]


def top_tokens(study: Study) -> Analysis:
  """OpenMoE's tables 9 and 15, and the same by lift."""
  header, parts = study.header, []
  for i in shown_routers(study):
    counts = summed(study.tally(i, study.token()))
    lifts = estimators.lift(counts, LEAST_PAIR)
    rows = []
    for e in range(header.num_experts):
      raw = np.argsort(-counts[:, e], kind='stable')[:_LISTED]
      order = np.argsort(-np.nan_to_num(lifts[:, e], nan=-1.0), kind='stable')[:_LISTED]
      raw = [p for p in raw if counts[p, e]]
      liked = [p for p in order if np.isfinite(lifts[p, e])]
      show = lambda places: '  '.join(text_of(study, int(study.ids[p])) for p in places)
      values = [lifts[p, e] for p in liked]
      most = f'{values[0]:.1f}' if values else '-'
      rows.append([e, int(counts[:, e].sum()), show(raw), show(liked), most])
    head = ('expert', 'assignments', 'most counted (as published)', 'by lift (as defined)', 'lift')
    note = f'Lift P(e|x)/P(e) of pairs with at least {LEAST_PAIR} assignments.'
    name = header.routers[i]
    parts.append(Table(f'top_tokens_{name}', f'Tokens of each expert, {name}', AS_DEFINED, head,
                       rows, note))  # fmt: skip
  return Analysis(
    'top_tokens',
    'Which tokens does an expert get?',
    'By count, as in the paper: frequent ids stand in nearly every list. By lift: ids that the '
    'expert gets more of than its load explains.',
    'A list says what is routed to an expert and not what the expert does with it.',
    tuple(parts),
  )


def vocabulary(study: Study) -> Analysis:
  """OLMoE's vocabulary specialisation by input, predicted and true next id."""
  header, k = study.header, study.header.top_k
  rows, parts = [], []
  for kind in dict.fromkeys(router.kind for router in header.routers):
    routers = header.of_kind(kind)
    layers = [header.routers[i].layer for i in routers]
    published, defined = [], []
    for column, label in KEYINGS.items():
      key = study.token(column)
      value = lambda c, least=LEAST_LISTED: estimators.specialisation(c, k, least)
      micro_of = lambda c: estimators.specialisation(c, k, LEAST_LISTED)['micro']
      tables = [summed(study.tally(i, key)) for i in routers]
      nulls = [summed(study.tally(i, key, null=True)) for i in routers]
      published.append(Series(label, layers, np.array([value(t, 1)['macro'] for t in tables])))
      found = [value(t) for t in tables]
      limits = [interval(study.tally(i, key), micro_of, 50)
                for i in routers]  # fmt: skip
      micro = np.array([f['micro'] for f in found])
      low, high = (np.array([limit[side] for limit in limits]) for side in (0, 1))
      defined.append(Series(label, layers, micro, low, high))
      chance = np.array([value(t)['micro'] for t in nulls])
      defined.append(Series(f'{label}, shuffled', layers, chance, chance=True))
      rows += [
        [header.routers[i], label, f'{a:.3f}', f'{f["macro"]:.3f}', f'{f["micro"]:.3f}',
         f'{c:.3f}', f['ids']]
        for i, a, f, c in zip(routers, published[-1].y, found, chance, strict=True)
      ]  # fmt: skip
    level = (k / header.num_experts, 'k/E')
    shared = ('layer', 'share of the most frequent expert')
    parts += [
      Chart(f'vocabulary_published_{kind}', f'Vocabulary specialisation, {kind}', 'lines',
            AS_PUBLISHED, *shared, tuple(published), level,
            'Unweighted mean over ids, no least count: an id seen once counts 100 %.',
            percent=True),
      Chart(f'vocabulary_{kind}', f'Vocabulary specialisation, {kind}', 'lines', AS_DEFINED,
            *shared, tuple(defined), level,
            f'Weighted by occurrences, ids with at least {LEAST_LISTED}.', percent=True),
    ]  # fmt: skip
  i = main_router(study)
  bars = []
  for column, label in KEYINGS.items():
    counts = summed(study.tally(i, study.token(column)))
    value, number = estimators.specialisation_of_experts(counts, k, LEAST_LISTED)
    bars.append(Series(label, range(header.num_experts), value, counts=number))
  parts.append(Chart(f'vocabulary_experts_{header.routers[i]}',
                     f'By expert, {header.routers[i]}', 'bars', AS_DEFINED, 'expert',
                     'mean share', tuple(bars), (k / header.num_experts, 'k/E'),
                     'Ids whose most frequent expert it is; every bar stands at its own expert.',
                     percent=True))  # fmt: skip
  head = ('router', 'by', 'published', 'macro', 'micro', 'micro shuffled', 'ids')
  note = f'macro and micro of ids with at least {LEAST_LISTED} occurrences.'
  return Analysis(
    'vocabulary',
    'Is routing about the token that is read, or the one that comes?',
    'For each id the share of its occurrences that its most frequent expert takes part in; by the '
    'id that is read, the one that the model predicts, and the one that follows.',
    'Without a least count the three cannot be compared: rare ids score high, and there are more '
    'of them among input ids than among predicted ones.',
    (Table('vocabulary', 'All routers', AS_DEFINED, head, rows, note), *parts),
  )


def probabilities(study: Study) -> Analysis:
  """OLMoE's figure 32: how P(e|x) is distributed over ids."""
  header, k = study.header, study.header.top_k
  i = header.of_kind(header.routers[-1].kind)[-1]
  counts = summed(study.tally(i, study.token()))
  with np.errstate(divide='ignore', invalid='ignore'):
    share = counts / (counts.sum(axis=1, keepdims=True) / k)
  edges = np.linspace(0, 1, 21)
  middle = ((edges[1:] + edges[:-1]) / 2).round(3).tolist()
  parts = []
  for name, kept, note in (
    (AS_PUBLISHED, counts >= 8, 'Pairs with at least 8 of the pair itself: the low side is cut.'),
    (AS_DEFINED, np.broadcast_to(study.times[:, None] >= 8, counts.shape),
     'Ids with at least 8 occurrences.'),
  ):  # fmt: skip
    experts = np.argsort(-counts.sum(axis=0))[[0, header.num_experts // 2, -1]]
    lines = []
    for e in dict.fromkeys(int(e) for e in experts):
      found, _ = np.histogram(share[kept[:, e], e], edges)
      lines.append(Series(f'expert {e}', middle, found / max(1, found.sum()), counts=found))
    parts.append(Chart(f'probabilities_{name}', f'Distribution of P(e|x), {header.routers[i]}',
                       'lines', name, 'P(e|x)', 'share of ids', tuple(lines), note=note,
                       percent=True))  # fmt: skip
  return Analysis(
    'probabilities',
    "Are a token's experts certain?",
    'How many ids go to an expert in which share of their occurrences: the most loaded, the '
    f'middle and the least loaded expert. k/E is {k / header.num_experts:.3f}.',
    'Ids count once each, whatever their frequency.',
    tuple(parts),
  )


def context(study: Study) -> Analysis:
  """Whether the same token takes the same experts in another context."""
  header, rows = study.header, []
  lines: dict[str, list[tuple[int, float, float, float, float]]] = {}
  key = study.token()
  often = study.times >= LEAST_PAIR

  def value(counts: np.ndarray) -> float:
    pairs = estimators.agreement_of_pairs(counts, header.top_k)
    weights = counts.sum(axis=1)
    known = often & np.isfinite(pairs) & (weights >= LEAST_PAIR)
    return float(np.average(pairs[known], weights=weights[known])) if known.any() else np.nan

  for i, router in enumerate(header.routers):
    table = study.tally(i, key)
    low, high = interval(table, value, 50)
    chance = value(summed(study.tally(i, key, null=True)))
    own, own_chance = value(summed(table)), chance
    single, more = conditional(study, i)
    rows.append([router, f'{own:.3f}', f'{low:.3f} to {high:.3f}', f'{own_chance:.3f}',
                 f'{single["corrected"]:.3f}', f'{more:.3f}',
                 f'{single["entropy"]:.3f}'])  # fmt: skip
    lines.setdefault(router.kind, []).append((router.layer, own, low, high, own_chance))
  series = []
  for kind, found in lines.items():
    layer, own, low, high, chance = (np.array(x) for x in zip(*found, strict=True))
    series.append(Series(kind, layer.tolist(), own, low, high))
    series.append(Series(f'{kind}, shuffled', layer.tolist(), chance, chance=True))
  head = ('router', 'agreement', '95 %', 'shuffled', 'I(x; e)', 'I(previous; e | x)', 'H(e)')
  note = f'Agreement over pairs of occurrences, ids with at least {LEAST_PAIR}. Information of the '
  note += 'first choice in bits, chance subtracted, of pairs with the token before that occur at '
  note += f'least {LEAST_PAIR} times among the {_FREQUENT} most frequent ids.'
  return Analysis(
    'context',
    'Does the context change the route of a token?',
    'Agreement is |A & B| / k of two occurrences of the same id, over all pairs: 1 where the id '
    'alone decides. An attention router below an MLP router looks at context where that does not.',
    'The second information is what the previous token adds; longer contexts are not counted.',
    (
      Chart('context', 'Agreement of the same id in other contexts', 'lines', AS_DEFINED, 'layer',
            '|A & B| / k', tuple(series), note=note),
      Table('context_information', 'All routers', AS_DEFINED, head, rows, note),
    ),
  )  # fmt: skip


def conditional(study: Study, router: int) -> tuple[dict[str, float], float]:
  """(I(x; e), I(previous; e | x)) of the first choice over the same tokens, bits.

  Of pairs that occur at least LEAST_PAIR times: in rarer ones every choice looks decided.
  """
  pairs = summed(study.tally(router, bigrams(study, True), top=1))
  pairs = np.where(pairs.sum(axis=1, keepdims=True) >= LEAST_PAIR, pairs, 0)
  n = math.isqrt(len(pairs))
  single = estimators.mutual_information(pairs.reshape(n, n, -1).sum(axis=0))
  pair = estimators.mutual_information(pairs)
  return single, pair['corrected'] - single['corrected']


CLASSES = ('word start', 'continuation', 'digits', 'punctuation', 'upper case', 'new line', 'other')


def class_of(text: str) -> int:
  """Index into CLASSES of a token's text."""
  bare = text.strip(' ')
  if '\n' in text:
    return 5
  if bare.isdigit():
    return 2
  if bare and not re.search(r'\w', bare):
    return 3
  if bare and bare.isupper():
    return 4
  if bare and re.search(r'\w', bare):
    return 0 if text.startswith(' ') else 1
  return 6


def classes(study: Study) -> Analysis:
  """Lift of classes of tokens."""
  header, parts = study.header, []
  of_id = np.array([class_of(study.record.pieces.get(int(i), '')) for i in study.ids])
  for i in shown_routers(study):
    counts = summed(study.tally(i, study.token()))
    table = np.stack([counts[of_id == c].sum(axis=0) for c in range(len(CLASSES))])
    there = table.sum(axis=1) > 0
    names = [name for name, has in zip(CLASSES, there, strict=True) if has]
    sizes = table[there].sum(axis=1) / header.top_k
    note = ', '.join(f'{n} {s:,.0f}' for n, s in zip(names, sizes, strict=True)) + ' tokens.'
    parts.append(Heat(f'classes_{header.routers[i]}', f'Classes of tokens, {header.routers[i]}',
                      AS_DEFINED, 'class', 'expert', names, range(header.num_experts),
                      estimators.lift(table[there], LEAST_PAIR), 'lift P(e|c)/P(e)',
                      note, centre=1.0))  # fmt: skip
  return Analysis(
    'classes',
    'Do experts follow the kind of token?',
    'Lift of an expert for a class of tokens: 1 where the class does not matter.',
    'Classes are by the text of the token alone and are ours.',
    tuple(parts),
  )
