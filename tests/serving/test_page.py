"""The chat page, used as a person uses it: in Chromium where the system has one."""

import html.parser

from openmoe.serving.engine import Engine
from openmoe.serving.page import PAGE
from tests.inference import case
from tests.serving import browser
from tests.serving.test_http import PLAIN, serving


class Elements(html.parser.HTMLParser):
  """Collects ids and links."""

  def __init__(self):
    super().__init__()
    self.ids, self.links = [], []

  def handle_starttag(self, tag, attrs):
    found = dict(attrs)
    self.ids += [found['id']] if 'id' in found else []
    self.links += [found[name] for name in ('src', 'href') if name in found]


def test_the_page_has_what_its_script_uses_and_nothing_from_elsewhere():
  elements = Elements()
  elements.feed(PAGE)
  used = {part.split("'")[0] for part in PAGE.split("$('")[1:]}
  assert used == set(elements.ids) and not elements.links
  if browser.is_there():
    talk()


def talk():
  """Says something twice, reads the answers, begins anew; text is never markup."""
  engine = Engine(case.model('openmoe', max_length=256, chat_template=PLAIN), 4, 8)
  engine.start()
  with serving(engine) as port, browser.browser() as window:
    window.open(f'http://127.0.0.1:{port}/')
    window.wait_for("return document.getElementById('name').textContent === 'openmoe'")
    window.run("document.getElementById('temperature').value = 0; return 1")
    window.run("document.getElementById('tokens').value = 12; return 1")
    window.type('#say', '<b>AB')
    window.click('#send')
    idle = "return document.getElementById('send').textContent === 'Send' &&"
    window.wait_for(f"{idle} document.querySelectorAll('.turn.assistant').length === 1")
    first = "return document.querySelectorAll('.turn')[1].textContent"
    prompt = engine.model.vocabulary.encode('<b>AB')
    (expected,) = engine.model.generate([prompt], 12)[0]
    assert window.run(first) == (expected.text or '(an empty answer)')
    assert window.run("return document.querySelectorAll('b:not(header b)').length") == 0
    window.type('#say', 'C\n')
    window.wait_for(f"{idle} document.querySelectorAll('.turn.assistant').length === 2")
    window.click('#fresh')
    assert window.run("return document.querySelectorAll('.turn').length") == 0
