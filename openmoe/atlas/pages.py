"""The pages of an atlas: an index, a page for each analysis and each expert; files beside pictures.

OUT/index.html           what was recorded, whether its identities hold, links
OUT/<analysis>.html      charts and tables, with what they mean and what they do not
OUT/figures/NAME.*       every picture as .svg and .png, and what it is drawn from as .csv
OUT/experts/*.html       an expert's tokens where they stand
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from openmoe.atlas.analyses import ANALYSES, OF_PAIRS, OF_SERIES
from openmoe.atlas.analyses.series import by_training, names_of
from openmoe.atlas.charts import LIGHT, Analysis, Chart, Table, draw
from openmoe.atlas.contexts import Context, contexts
from openmoe.atlas.counts import Study
from openmoe.atlas.identities import identities
from openmoe.atlas.record import Record
from openmoe.checkpoint.paths import write_whole
from openmoe.config import ConfigError
from openmoe.evaluation import figures
from openmoe.observe import page

FIGURES, EXPERTS = 'figures', 'experts'
_FOOTER = 'Made by scripts.atlas. docs/ROUTING.md says what each figure means.'


def choose(names: Sequence[str] | None, known: Mapping[str, Callable]) -> dict[str, Callable]:
  """Analyses by name; None for all.

  Raises:
    ConfigError: one is not known.
  """
  wrong = [name for name in names or () if name not in known]
  if wrong:
    raise ConfigError(f'{wrong[0]!r} is no analysis; there are: {", ".join(known)}.')
  return {name: one for name, one in known.items() if names is None or name in names}


def write_atlas(
  folders: Sequence[str],
  out: str,
  only: Sequence[str] | None = None,
  *,
  experts: bool = True,
  show: Callable[[str], None] = lambda text: None,
) -> list[str]:
  """Analyses records: each analysis of the last one, those of series where there are several.

  Args:
    folders: of records.
    only: names of analyses.
    experts: pages of experts too.

  Returns:
    Paths of the pages.
  """
  chosen = choose(only, ANALYSES | OF_SERIES)
  studies = by_training([Study(Record(folder)) for folder in folders])
  last = studies[-1]
  found: list[Analysis] = []
  for name, analysis in chosen.items():
    show(name)
    if name in OF_SERIES:
      result = analysis(studies) if len(studies) > 1 else None
    else:
      result = analysis(last)
    found += [] if result is None else [result]
  # Of the first analyses on, so that a broken off command leaves whole pages.
  written = [write_page(one, out, last.record.name) for one in found]
  if experts and only is None:
    show('pages of experts')
    written += write_experts(last, out)
  written.append(_write_index(last, studies, found, out, experts and only is None))
  return written


def write_comparison(folders: Sequence[str], out: str) -> list[str]:
  """One page about two records of the same tokens."""
  studies = [Study(Record(folder)) for folder in folders]
  found = [analysis(studies) for analysis in OF_PAIRS.values()]
  found.append(OF_SERIES['saturation'](studies))
  names = names_of(studies)
  parts = [_analysis_parts(one, out) for one in found]
  facts = [('first', names[0]), ('second', names[1]), ('tokens', f'{studies[0].record.tokens:,}')]
  sections = [page.section(one.title, *part) for one, part in zip(found, parts, strict=True)]
  body = page.join([page.cards(facts), *sections])
  text = page.document(f'{names[0]} and {names[1]}', body, footer=_FOOTER)
  return [_write(out, 'comparison.html', text)]


def write_page(analysis: Analysis, out: str, about: str) -> str:
  """One analysis with its files; returns the page's path."""
  back = page.paragraph(page.element('a', 'index', href='index.html'), ' · ', about, kind='muted')
  text = page.document(analysis.title, back, *_analysis_parts(analysis, out), footer=_FOOTER)
  return _write(out, f'{analysis.name}.html', text)


def _analysis_parts(analysis: Analysis, out: str) -> list[page.Html]:
  parts = [
    page.paragraph(analysis.means),
    page.paragraph(page.element('b', 'It does not say: '), analysis.means_not, kind='muted'),
  ]
  for part in analysis.parts:
    files = pathlib.Path(out) / FIGURES
    files.mkdir(parents=True, exist_ok=True)
    name = part.name.replace('/', '_')
    note = f'{part.estimator}. {part.note}'.strip()
    links = _links(name, isinstance(part, Table))
    if isinstance(part, Table):
      numbers = [i for i, _ in enumerate(part.head) if _are_numbers(row[i] for row in part.cells)]
      parts += [page.element('h3', part.title), page.table(part.head, part.cells, numbers),
                page.paragraph(note, ' ', links, kind='muted')]  # fmt: skip
      figures.write_csv(part.rows(), files / name)
    else:
      caption = page.join([note, links], ' ')
      drawn = page.figure(draw(part), part.name, caption)
      narrow = isinstance(part, Chart) and part.kind == 'radar'
      style = 'max-width: 38rem;' if narrow else None
      parts += [page.element('h3', part.title), page.element('div', drawn, style=style)]
      figures.write(draw(part, LIGHT), part.rows(), files / name)
  return parts


def _are_numbers(cells) -> bool:
  plain = lambda cell: str(cell).strip('+-%').replace(',', '').replace('.', '')
  return all(plain(cell).isdigit() or str(cell) == '-' for cell in cells)


def _links(name: str, table: bool) -> page.Html:
  kinds = ('csv',) if table else ('csv', 'svg', 'png')
  return page.join(
    [page.element('a', kind, href=f'{FIGURES}/{name}.{kind}') for kind in kinds], ' '
  )


def _write(out: str | os.PathLike, name: str, text: str) -> str:
  path = pathlib.Path(out) / name
  path.parent.mkdir(parents=True, exist_ok=True)
  write_whole(path, text.encode())
  return str(path)


def _write_index(
  last: Study, studies: Sequence[Study], found: Sequence[Analysis], out: str, experts: bool
) -> str:
  header = last.header
  facts = [
    ('model', header.model),
    ('step', '-' if header.step is None else f'{header.step:,}'),
    ('tokens', f'{last.record.tokens:,}'),
    ('documents', f'{last.record.documents:,}'),
    ('routers', len(header.routers)),
    ('experts, choices', f'{header.num_experts}, {header.top_k}'),
    ('capacity', 'dropless' if header.capacity is None else f'{header.capacity} slots'),
  ]
  rows = [
    [
      page.element('a', one.title, href=f'{one.name}.html'),
      one.means.split('. ')[0].rstrip('.') + '.',
    ]
    for one in found
  ]
  checks = identities(last)
  wrong = [one for one in checks if not one.holds]
  said = f'{len(wrong)} of {len(checks)} identities are broken' if wrong else 'all identities hold'
  parts = [
    page.cards(facts),
    page.paragraph(f'{said[0].upper()}{said[1:]}.', kind='bad' if wrong else 'good'),
    page.section('Analyses', page.table(('question', 'what is shown'), rows)),
  ]
  if len(studies) > 1:
    parts.append(page.section('Series', page.table(('record', 'step', 'tokens seen'), [
      [name, s.header.step, s.header.tokens_seen]
      for name, s in zip(names_of(studies), studies, strict=True)
    ])))  # fmt: skip
  if experts:
    links = [
      [router, page.join([
        page.element('a', e, href=f'{EXPERTS}/{router}_{e}.html')
        for e in range(header.num_experts)
      ], ' ')]
      for router in header.routers
    ]  # fmt: skip
    parts.append(page.section('Experts', page.table(('router', 'expert'), links)))
  told = [[name, _plain(getattr(header, name))] for name in header.__dataclass_fields__]
  told += [['data digest', last.record.data], ['folder', last.record.folder]]
  parts.append(page.details('What exactly was recorded', page.table(('field', 'value'), told)))
  return _write(out, 'index.html', page.document(f'Atlas of {last.record.name}', *parts,
                                                 footer=_FOOTER))  # fmt: skip


def _plain(value: object) -> str:
  return ', '.join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- experts


def write_experts(study: Study, out: str) -> list[str]:
  """A page for each expert of each router."""
  header, written = study.header, []
  for router, of_router in zip(header.routers, contexts(study.record), strict=True):
    for e, (strongest, chance) in enumerate(of_router):
      name = f'{EXPERTS}/{router}_{e}.html'
      links = [('index', '../index.html')]
      links += [(f'expert {o}', f'{router}_{o}.html') for o in (e - 1, e + 1)
                if 0 <= o < header.num_experts]  # fmt: skip
      way = page.join([page.element('a', text, href=target) for text, target in links], ' · ')
      about = page.paragraph(
        f'{study.record.name}. The darker a token, the larger the weight of this expert; the one '
        'that was looked for is framed. Tokens without colour went elsewhere.',
        kind='muted',
      )
      parts = [page.paragraph(way), about]
      for title, some in (('Largest weights', strongest), ('By chance', chance)):
        shown = [_shown(context, study.record.pieces) for context in some]
        parts.append(page.section(title, *(shown or [page.paragraph('None.', kind='muted')])))
      text = page.document(f'{router}, expert {e}', *parts, footer=_FOOTER)
      written.append(_write(out, name, text))
  return written


def _shown(context: Context, pieces: Mapping[int, str]) -> page.Html:
  most = max(float(context.weights.max()), 1e-9)
  spans = []
  for i, (token, weight) in enumerate(zip(context.tokens, context.weights, strict=True)):
    text = pieces.get(int(token), f'<{token}>').replace('\n', '⏎\n').replace('\t', '⇥')
    share = round(55 * float(weight) / most)
    style = f'background: color-mix(in srgb, var(--series-0) {share}%, transparent);'
    if i == context.at:
      style += ' outline: 1.5px solid var(--series-1); border-radius: 2px;'
    spans.append(page.element('span', text, style=style, title=f'{weight:.3f}'))
  weight = context.weights[context.at]
  where = f'{context.document}, position {context.position}, weight {weight:.3f}'
  return page.join([page.element('pre', *spans), page.paragraph(where, kind='muted')])
