"""Notice that this machine will be taken away, heard from the metadata server of GCE.

SLURM announces the end of a job by a signal instead (--signal=USR1@120), which signals.py hears.
"""

from __future__ import annotations

import os
import pathlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Self

_PERIOD = 5.0  # seconds between two looks
_PRODUCT = pathlib.Path('/sys/class/dmi/id/product_name')
# What the server says, and what it says while nothing is ahead.
_QUESTIONS = (('preempted', 'FALSE'), ('maintenance-event', 'NONE'))


def metadata_server() -> str | None:
  """Address of this machine's metadata server; None where this is no machine of GCE."""
  if host := os.environ.get('GCE_METADATA_HOST'):
    return host
  try:
    here = 'Google' in _PRODUCT.read_text(encoding='utf-8')
  except OSError:
    return None
  return 'metadata.google.internal' if here else None


class Notice:
  """Listens while it is entered; where there is no such server it does nothing.

  Args:
    heard: is told once for each thing that is announced, in words, by a thread of its own.
    period: seconds between two looks.
  """

  def __init__(self, heard: Callable[[str], None], period: float = _PERIOD):
    self._heard, self._period = heard, period
    self._server = metadata_server()
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._listen, name='notice', daemon=True)

  def __enter__(self) -> Self:
    if self._server:
      self._thread.start()
    return self

  def __exit__(self, *unused) -> None:
    self._closed.set()

  def _listen(self) -> None:
    known = dict(_QUESTIONS)
    while not self._closed.wait(self._period):
      for name, usual in _QUESTIONS:
        answer = self._ask(name) or known[name]
        if answer not in (usual, known[name]):
          self._heard(f'the metadata server announces {name} {answer}')
        known[name] = answer

  def _ask(self, name: str) -> str | None:
    url = f'http://{self._server}/computeMetadata/v1/instance/{name}'
    request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
    try:
      with urllib.request.urlopen(request, timeout=self._period) as answer:
        return answer.read(1000).decode('utf-8', 'replace').strip()
    except (OSError, urllib.error.URLError, ValueError):
      return None  # it says nothing for a moment; the next look is soon
