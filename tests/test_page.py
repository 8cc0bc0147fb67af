"""Pages: text stays text, nothing is fetched, figures follow the colours of the page."""

import html.parser
import re

import pytest
from matplotlib.figure import Figure

from openmoe.observe import page

HOSTILE = '</script><img src=x onerror="alert(1)">\x1b[2J $x_1$ é'


class Reader(html.parser.HTMLParser):
  """What a browser finds: elements with their attributes, ids, and the text."""

  def __init__(self, text: str):
    super().__init__()
    self.elements: list[tuple[str, dict]] = []
    self.text = ''
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text += data


def drawn(label: str) -> Figure:
  figure = Figure(figsize=(6, 2))
  axes = figure.subplots()
  axes.plot([0, 1], [1, 0], color=page.SERIES[0], label=label, marker='o')
  axes.set_title(label, color=page.INK)
  axes.legend(labelcolor=page.INK)
  page.style(axes)
  return figure


@pytest.fixture(scope='module')
def read() -> Reader:
  whole = page.document(
    HOSTILE,
    page.cards([(HOSTILE, HOSTILE)]),
    page.section(HOSTILE, page.table([HOSTILE], [[HOSTILE]]), page.pre(HOSTILE), HOSTILE),
    page.details(HOSTILE, page.figure(drawn(HOSTILE), HOSTILE, HOSTILE)),
    page.figure(drawn('two'), 'two'),
    footer=HOSTILE,
  )
  return Reader(whole)


def test_text_of_others_is_no_markup(read):
  assert not {'img', 'script'} & {tag for tag, _ in read.elements}
  assert not [a for _, attrs in read.elements for a in attrs if a.startswith('on')]
  assert '\x1b' not in read.text
  assert read.text.count('</script><img src=x onerror="alert(1)">\\x1b[2J $x_1$ é') >= 9


def test_nothing_is_fetched(read):
  links = [
    value
    for _, attrs in read.elements
    for name, value in attrs.items()
    if name.split(':')[-1] in ('src', 'href', 'srcset', 'data')
  ]
  assert all(link.startswith(('#', 'data:')) for link in links), links
  policies = [a['content'] for t, a in read.elements if a.get('http-equiv')]
  assert len(policies) == 1
  assert policies[0].startswith("default-src 'none'")
  assert 'script' not in policies[0]
  assert "script-src 'unsafe-inline'" in page.document('a', script='1')


def test_every_id_is_there_once_and_every_reference_leads_to_one(read):
  ids = [attrs['id'] for _, attrs in read.elements if 'id' in attrs]
  assert len(ids) == len(set(ids))
  references = [v for _, a in read.elements for k, v in a.items() if k.endswith('href')]
  assert {r[1:] for r in references} <= set(ids)


def test_figures_have_the_colours_of_the_page():
  svg = page.figure(drawn('a'), 'a')
  assert 'var(--series-0)' in svg
  assert 'var(--ink)' in svg
  assert '#0102' not in svg


def luminance(colour: str) -> float:
  parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
  return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize('theme', [0, 1])
def test_everything_can_be_seen_on_its_paper(theme):
  block = re.findall(r':root \{(.*?)\}', page._STYLE, re.DOTALL)[theme]
  colours = dict(re.findall(r'--([\w-]+): (#\w{6})', block))
  for name, colour in colours.items():
    light, dark = sorted((luminance(colour), luminance(colours['paper'])), reverse=True)
    contrast = (light + 0.05) / (dark + 0.05)
    needed = 1 if name in ('paper', 'card', 'grid') else 3 if name.startswith('series') else 4.5
    assert contrast >= needed, (name, contrast)
