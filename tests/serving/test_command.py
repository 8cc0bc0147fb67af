"""scripts.serve: what it says before it serves, and what it refuses."""

import socket

import pytest

from scripts import serve


def test_addresses_that_cannot_be_had_are_refused_before_work(capsys):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    assert serve.main([f'--port={port}', '--checkpoint=absent']) == 64
  assert f'--port={port}: ' in (said := capsys.readouterr().err) and 'choose another' in said
  assert serve.main(['--port=99999999', '--checkpoint=absent']) == 64
  assert serve.main(['--host=no.such.host.invalid', '--checkpoint=absent']) == 64


@pytest.mark.parametrize('flag', ['--timeout=0', '--timeout=nan'])
def test_values_that_cannot_be_are_refused(flag, capsys):
  assert serve.main([flag, '--checkpoint=absent', '--port=0']) == 64
  assert 'timeout=' in capsys.readouterr().err
