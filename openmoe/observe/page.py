"""Pages for people: one HTML file with everything in it, light and dark, that opens no connection.

Text is escaped unless it is Html already, so nothing that a run directory holds becomes markup.
Figures are matplotlib's, as SVG in the page, in colours that follow the page's: draw with INK,
MUTED, GRID, PAPER and SERIES, and they are replaced by the variables of the style.
"""

from __future__ import annotations

import html
import io
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import matplotlib
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from openmoe.observe.text import visible

# Stand-ins that a figure is drawn in. No two pictures want these as colours of their own.
INK, MUTED, GRID, PAPER = '#010203', '#010204', '#010205', '#010206'
SERIES = tuple(f'#0102{number:02x}' for number in range(0x10, 0x18))
_VARIABLES = {INK: 'ink', MUTED: 'muted', GRID: 'grid', PAPER: 'paper'} | {
  colour: f'series-{number}' for number, colour in enumerate(SERIES)
}

# Series: Okabe and Ito's colours, which people with any colour vision tell apart; for the dark page
# lightened to a contrast of at least 3 with its paper, as are the dim ones for the light page.
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f6f8; --ink: #1d1d24;
  --muted: #6a6a76; --grid: #e4e4ea; --good: #00734f; --warn: #9a5b00; --bad: #b3261e;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #b5588a;
  --series-4: #3c96c8; --series-5: #b87d00; --series-6: #6b6b00; --series-7: #4a4a55; }
@media (prefers-color-scheme: dark) { :root { --paper: #15161a; --card: #1f2026; --ink: #e9e9ee;
  --muted: #a0a0ac; --grid: #34353d; --good: #4fd0a0; --warn: #f2b94a; --bad: #ff8a80;
  --series-0: #5fb4ec; --series-1: #ff8c4a; --series-2: #35c79b; --series-3: #e6a0c8;
  --series-4: #9ad4f7; --series-5: #f0c04c; --series-6: #e2dc62; --series-7: #b9b9c6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; padding-top: .6rem;
  border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 48rem; }
a { color: var(--series-0); }
.muted { color: var(--muted); } .good { color: var(--good); } .warn { color: var(--warn); }
.bad { color: var(--bad); }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .55rem .9rem; min-width: 8rem; }
.card b { display: block; font-size: 1.2rem; font-weight: 600; }
.card span { color: var(--muted); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.1rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--grid); min-width: 4rem; }
th { color: var(--muted); font-weight: 500; font-size: .87rem; white-space: nowrap; }
td > span { white-space: nowrap; }
th.number, td.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
figure { margin: .8rem 0; } figcaption { color: var(--muted); font-size: .9rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, 'Segoe UI', sans-serif !important; }
pre { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; overflow-x: auto;
  font: 12.5px/1.5 ui-monospace, 'SF Mono', Menlo, Consolas, monospace; white-space: pre-wrap; }
details { margin: .5rem 0; } summary { cursor: pointer; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
@media print { body { max-width: none; } details > * { display: block; } }
"""


class Html(str):
  """Text that is markup already."""

  __slots__ = ()


def escape(text: object) -> Html:
  """Text as it is read, without markup or control characters of its own; Html stays as it is.

  >>> escape('<b>\\x1b[2J')
  '&lt;b&gt;\\\\x1b[2J'
  """
  if isinstance(text, Html):
    return text
  return Html(html.escape(visible(str(text))))


def join(parts: Iterable[object], between: str = '\n') -> Html:
  """Parts one after the other; those that are no Html are escaped."""
  return Html(between.join(escape(part) for part in parts))


def element(name: str, *parts: object, **attributes: object) -> Html:
  """<name attributes>parts</name>; a trailing _ of an attribute (class_) is dropped."""
  given = ''.join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items() if v is not None)
  return Html(f'<{name}{given}>{join(parts, "")}</{name}>')


def section(title: object, *parts: object) -> Html:
  """A part of the page under a heading."""
  return join([element('h2', title), *parts])


def paragraph(*parts: object, kind: str | None = None) -> Html:
  """A paragraph; kind is muted, good, warn, bad or None."""
  return element('p', *parts, class_=kind)


def cards(facts: Iterable[tuple[object, object]]) -> Html:
  """The figures that matter, (name, value), side by side."""
  one = lambda name, value: element(
    'div', element('b', value), element('span', name), class_='card'
  )
  return element('div', *(one(*fact) for fact in facts), class_='cards')


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()):
  """A table.

  Args:
    head: of the columns.
    rows: cells, as many as the head has.
    numbers: columns that are set to the right.
  """
  kind = lambda column: 'number' if column in numbers else None
  line = lambda name, cells: element(
    'tr', *(element(name, cell, class_=kind(column)) for column, cell in enumerate(cells))
  )
  body = element('tbody', *(line('td', row) for row in rows))
  return element('div', element('table', element('thead', line('th', head)), body), class_='scroll')


def details(summary: object, *parts: object, open: bool = False) -> Html:
  """Something that is folded until it is clicked on."""
  return element('details', element('summary', summary), *parts, open='' if open else None)


def pre(text: object) -> Html:
  """Text as it stands."""
  return element('pre', text)


def style(axes: Axes) -> None:
  """The look that all figures of a page share."""
  axes.set_facecolor('none')
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
  for side in ('left', 'bottom'):
    axes.spines[side].set_color(MUTED)
  axes.tick_params(labelsize=9, color=MUTED, labelcolor=INK)
  axes.grid(axis='y', color=GRID, lw=0.8)
  axes.set_axisbelow(True)
  for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
    text.set_color(INK)


def figure(
  drawn: Figure, name: str, caption: object = '', also: Mapping[str, str] = MappingProxyType({})
) -> Html:
  """A figure of matplotlib's as SVG in the colours of the page.

  Args:
    drawn: the figure; texts in it are taken as they stand, without formulas.
    name: unlike that of any other figure of the page; said to who cannot see it.
    caption: shown under it.
    also: colour as #rrggbb -> variable of the style, for figures that are drawn elsewhere, too.
  """
  for text in drawn.findobj(Text):
    text.set_parse_math(False)
    text.set_text(visible(text.get_text()))
    if colors.same_color(text.get_color(), 'black'):  # matplotlib's own; no ink of a dark page
      text.set_color(INK)
  out = io.StringIO()
  settings = matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name})
  with settings, warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Glyph')  # the browser has fonts of its own
    drawn.savefig(
      out, format='svg', dpi=150, transparent=True, metadata={'Date': None, 'Creator': None}
    )
  svg = out.getvalue()
  svg = svg[svg.index('<svg') :].replace(
    '<svg ', f'<svg role="img" aria-label="{escape(name)}" ', 1
  )
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  # A page may have each name once, and figures have some in common, such as "axes_1".
  svg = re.sub(r'<g id="[^"]*">', '<g>', svg)
  mark = f'f{zlib.crc32(name.encode()):08x}-'
  svg = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', mark, svg)
  for colour, variable in {**_VARIABLES, **also}.items():
    svg = svg.replace(colour, f'var(--{variable})')
  below = element('figcaption', caption) if caption else Html()
  return element('figure', Html(svg), below)


def document(title: object, *parts: object, footer: object = '', script: str = '') -> str:
  """The whole page.

  Args:
    title: of the window and the heading.
    parts: of the body.
    footer: small, at the end.
    script: JavaScript of ours for a page that answers clicks; none of anybody's data.
  """
  scripts = " script-src 'unsafe-inline';" if script else ''
  # Whatever slipped into the page, the browser loads nothing from anywhere for it.
  policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:;{scripts}"
  head = [
    '<meta charset="utf-8">',
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<title>{escape(title)}</title>',
    f'<style>{_STYLE}</style>',
  ]
  body = [element('main', element('h1', title), *parts)]
  if footer:
    body.append(element('footer', footer))
  if script:
    body.append(Html(f'<script>{script}</script>'))
  return '<!doctype html>\n<html lang="en"><head>\n{}\n</head><body>\n{}\n</body></html>\n'.format(
    '\n'.join(head), join(body)
  )
