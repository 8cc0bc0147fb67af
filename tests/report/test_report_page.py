"""report.html: everything is on it, nothing runs or is fetched, and a browser shows it."""

import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from openmoe.config import ConfigError
from openmoe.report.build import report, write_report
from openmoe.report.facts import read_run
from scripts import report as script
from tests.report.case import HOSTILE, write_run
from tests.test_page import Reader

STAGES = [['first stage', 30], ['second stage', 40]]


def sections(page: str) -> list[str]:
  return re.findall(r'<h2>(.*?)</h2>', page)


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> str:
  folder = tmp_path_factory.mktemp('runs') / 'a run'
  return report([write_run(folder, stages=STAGES, restart=25, text=HOSTILE)])


def test_a_run_has_every_section(whole):
  assert sections(whole) == [
    'Loss', 'Balance', 'Experts', 'Health', 'Wall time', 'Starts', 'Samples', 'Configuration',
  ]  # fmt: skip


def test_text_of_a_run_is_no_markup(whole):
  read = Reader(whole)
  assert not {tag for tag, _ in read.elements} & {'script', 'iframe', 'img', 'link', 'object'}
  assert '\x1b' not in whole
  shown = '<script>alert(1)</script>\\x1b[2J'
  for place in ('host', 'rule', 'sample', 'configuration', 'device'):
    assert read.text.count(shown) >= 8, place


def test_nothing_is_fetched(whole):
  links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', whole)
  assert all(link.startswith(('#', 'data:image/png;base64,')) for link in links)
  assert "default-src 'none'" in whole


def test_figures_and_tables_say_what_the_notes_say(whole):
  text = Reader(whole).text
  for part in (
    'first stage', 'second stage', '1 restart', 'unigram entropy  3.000', 'validation  2.283',
    'killed', 'Changed at step 25', '-B = 2', '+B = 3', 'fired', 'cleared', 'layer 1',
    'done again, as a kill undid it', 'and on',
  ):  # fmt: skip
    assert part in text, part


def test_the_parts_of_the_wall_time_add_up(tmp_path):
  run = read_run(write_run(tmp_path / 'run', restart=25))
  assert run.goodput.wall == 122
  assert run.goodput.starts[0].redone == 5


def test_runs_side_by_side(tmp_path):
  names = [
    write_run(tmp_path / 'dense', layers=0, steps=30),
    write_run(tmp_path / ('a name that is very long ' * 6), restart=20),
    write_run(tmp_path / 'third', text='other'),
  ]
  page = report(names)
  assert sections(page)[:4] == ['Loss', 'Wall time', 'Configuration', 'Each run']
  ids = [attrs['id'] for _, attrs in Reader(page).elements if 'id' in attrs]
  assert len(ids) == len(set(ids))
  text = Reader(page).text
  assert 'dense to third' in text
  assert "+NAME = 'other'" in text


@pytest.mark.parametrize('options', [{'steps': 1}, {'bare': True}, {'layers': 0, 'steps': 2}])
def test_runs_that_have_little_to_show(tmp_path, options):
  page = report([write_run(tmp_path / 'run', **options)])
  assert sections(page)[0] == 'Loss'


def test_what_is_damaged_is_told_and_the_rest_is_shown(tmp_path):
  folder = write_run(tmp_path / 'run')
  for name in ('run.json', 'samples.json', 'router/000000000.npz'):
    (folder / name).write_bytes(b'\xff\xfe no')
  (folder / 'timeline.jsonl').write_bytes(b'{"step": 1}\n\xff\n')
  (folder / 'health.jsonl').write_bytes(b'\xff{"step": 1}\n{"step": 1, "value": {}}\n')
  text = Reader(report([folder])).text
  for name in ('run.json', 'samples.json', 'router/'):
    assert f'{name} cannot be read' in text
  (folder / 'metrics.jsonl').write_text(
    '{"step": 1, "loss": "x"}\n{"step": 2, "loss": {}, "tokens_seen": [], "kind": 3}\n'
  )
  assert 'Loss' in sections(report([folder]))


def test_a_diverged_run_is_drawn_as_far_as_it_went(tmp_path):
  folder = write_run(tmp_path / 'run', steps=5, bare=True)
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "kind": "train", "loss": "nan", "tokens_seen": 24576.0}\n')
  assert 'nan' in Reader(report([folder])).text


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='give the directory of a run'):
    report([tmp_path])
  assert script.main([str(tmp_path)]) == 64


def test_the_command_writes_one_page(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('a', 'b'):
    write_run(tmp_path / name, bare=True, steps=3)
  assert script.main(['a']) == 0
  assert capsys.readouterr().out.strip() == str(tmp_path / 'a' / 'report.html')
  assert script.main(['a', 'b', '--out', 'two.html']) == 0
  assert (tmp_path / 'two.html').read_text(encoding='utf-8').startswith('<!doctype html>')
  assert write_report('b') == str(tmp_path / 'b' / 'report.html')


def browser() -> str | None:
  names = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
  return next((found for name in names if (found := shutil.which(name))), None)


def test_a_browser_shows_it(whole, tmp_path):
  """Where there is a browser: light and dark, without a word of complaint; else its structure."""
  path = tmp_path / 'report.html'
  path.write_text(whole, encoding='utf-8')
  assert whole.count('<figure>') == whole.count('</figure>') == 4
  if browser():
    pictures = [screenshot(path, tmp_path / f'{dark}.png', dark) for dark in (0, 1)]
    light, dark = (picture[..., :3].mean() for picture in pictures)
    assert light > 0.8
    assert dark < 0.3
    assert min(picture[..., :3].std() for picture in pictures) > 0.03  # not blank


def screenshot(path: pathlib.Path, to: pathlib.Path, dark: int) -> np.ndarray:
  scheme = ['--force-dark-mode', '--blink-settings=preferredColorScheme=0'] if dark else []
  done = subprocess.run(
    [
      browser(), '--headless', '--no-sandbox', '--disable-gpu', *scheme, '--enable-logging=stderr',
      f'--user-data-dir={to}.profile', f'--screenshot={to}', '--window-size=1100,1600', str(path),
    ],
    capture_output=True, text=True, timeout=300, check=True,
  )  # fmt: skip
  assert 'CONSOLE' not in done.stderr
  return imread(to)
