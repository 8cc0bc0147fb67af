"""A training step is a short walk, and the README shows the way."""

import re

from tests.reading_path import ROOT, reading_path


def test_a_training_step_is_read_in_14_files_as_the_readme_says():
  path = reading_path()
  assert len(path) <= 14, path
  assert sum(path.values()) <= 2800, path
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  section = text.split('## Reading order')[1].split('\n## ')[0]
  assert set(re.findall(r'\((openmoe/\S+\.py)\)', section)) == set(path)
  said = re.search(r'(\d+) files and some ([\d,]+) lines', section)
  assert said, 'the section says how many files and lines there are'
  assert int(said[1]) == len(path)
  lines = int(said[2].replace(',', ''))
  assert abs(lines - sum(path.values())) <= 50, (lines, sum(path.values()))
