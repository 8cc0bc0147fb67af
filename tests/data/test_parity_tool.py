"""The command that compares real processes; the whole of it takes minutes."""

from __future__ import annotations

import json
import pathlib

import pytest

from tests.parity import data_stream


def write_digests(folder: pathlib.Path, name: str, lines: list[str]) -> None:
  (folder / f'digests-{name}').write_text('\n'.join(lines))


def test_a_digest_that_differs_after_a_restart_is_seen(tmp_path):
  write_digests(tmp_path, '0', ['0 0 aa', '0 1 bb', '1 0 cc', '1 1 dd', '2 0 ee'])
  write_digests(tmp_path, '1', ['1 0 cc', '1 1 XX'])
  found = data_stream.batch_digests(tmp_path, num_shards=2)
  assert len(found[0].pop()) == 64
  assert found[1] == {'differs after the restart'}
  assert found[2] == {'incomplete'}


def test_only_whole_positions_are_continued(tmp_path):
  for name in ('3.a.position', '3.b.position', '6.a.position', 'b.writing-1'):
    (tmp_path / name).write_bytes(b'')
  assert data_stream.saved_steps(tmp_path, 2) == [3]


@pytest.mark.slow
def test_hosts_and_kills_do_not_change_a_batch(capsys):
  code = data_stream.main(['--hosts=1,2', '--kill_at=3', '--steps=6', '--num_shards=2', '--json'])
  result = json.loads(capsys.readouterr().out)
  assert code == 0
  assert result['mismatches'] == 0 and result['distinct_batches'] == 6
