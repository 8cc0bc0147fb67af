"""Jinja chat templates, rendered in a process of their own.

A template comes with somebody's weights. jinja2's sandbox keeps it from code, but loops in loops
never end and a filter can take all memory, so it is rendered by a small program with bounds on
both, which stays for the next conversation. Nothing is compiled before it is needed.
"""

from __future__ import annotations

import json
import pathlib
import selectors
import subprocess
import sys
import weakref
from collections.abc import Mapping
from typing import Any

from openmoe.config import ConfigError

SECONDS = 10.0  # for one conversation, the start of the program included
_WORKER = pathlib.Path(__file__).with_name('template_worker.py')


class Renderer:
  """One template.

  Args:
    source: its text.
    where: what messages call it.
  """

  def __init__(self, source: str, where: str):
    self._source, self._where = source, where
    self._worker: subprocess.Popen | None = None

  def render(self, values: Mapping[str, Any]) -> str:
    """The text of a conversation.

    Raises:
      ConfigError: the template does not compile, refuses these messages, takes too long or too
        much memory, or jinja2 is not installed.
    """
    if self._worker is None or self._worker.poll() is not None:
      self._worker = subprocess.Popen(
        [sys.executable, '-I', str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
      )
      weakref.finalize(self, _end, self._worker)
    answer = self._ask({'source': self._source, 'values': dict(values)})
    if 'text' not in answer:
      raise ConfigError(f'The chat template of {self._where}: {answer["error"]}')
    return answer['text']

  def _ask(self, request: Mapping[str, Any]) -> dict[str, str]:
    worker = self._worker
    try:
      worker.stdin.write(json.dumps(request).encode() + b'\n')
      worker.stdin.flush()
      with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        line = worker.stdout.readline() if selector.select(SECONDS) else None
    except BrokenPipeError:
      line = b''
    if line:
      return json.loads(line)
    _end(worker)
    if line is None:
      return {'error': f'it was not done after {SECONDS:.0f} s; give a template that ends.'}
    return {'error': 'it took more memory than a text can need; give another template.'}


def _end(worker: subprocess.Popen) -> None:
  worker.kill()
  worker.wait()
  for stream in (worker.stdin, worker.stdout):
    stream.close()
