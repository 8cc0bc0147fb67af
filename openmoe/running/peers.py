"""Watches over the other processes of a run, so that none waits for one that has gone.

Every process says once in a while that it is there, by the connection that the roll call has left
to process 0, which passes on who does not. A process that was killed is known at once, as its
connection ends; one that is stopped, or whose machine is lost, when it has said nothing for the
time-out. Whoever hears of it says who that is and ends with PeerLost.exit_code: no collective
operation would ever come back.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from openmoe.observe.text import visible
from openmoe.running.rollcall import Peer, PeerLost

# How the text of a failed collective operation begins, whatever kind of error it is.
_FAILED_OPERATION = re.compile(r'[A-Z_]{5,}: ')
_GRACE = 8.0  # seconds in which a process may still end by itself for what ended another


class Peers:
  """Watches while it is entered.

  Args:
    others: as rollcall.meet() gives them.
    index, count: of this process, and how many there are.
    timeout: seconds of silence after which a process is taken for lost.
    end: is given the words and does not return; for tests.
  """

  def __init__(
    self,
    others: Sequence[Peer],
    index: int,
    count: int,
    timeout: float,
    end: Callable[[str], None] | None = None,
  ):
    self._others = {peer.index: peer for peer in others}
    self._index, self._count, self._timeout = index, count, timeout
    self._end = end or _end_the_process
    self._closed = threading.Event()
    self._lock = threading.Lock()  # of what is sent
    self._threads = [
      threading.Thread(target=self._listen, args=(peer,), name=f'peer {peer.index}', daemon=True)
      for peer in others
    ]
    self._beats = threading.Thread(target=self._beat, name='peers', daemon=True)
    self._ending = threading.Lock()  # one of the threads speaks

  def __enter__(self) -> Self:
    for thread in [*self._threads, self._beats]:
      thread.start()
    return self

  def __exit__(self, kind, error: BaseException | None, *unused) -> None:
    """Says that this process ends, and why where it ends before its time."""
    if error is not None and _FAILED_OPERATION.match(str(error)):
      # Most often another process is the reason; the listeners need a while to know which, and end
      # this process then.
      time.sleep(self._timeout + 2)
    self._closed.set()
    if error is None or (isinstance(error, SystemExit) and not error.code):
      self._tell({'bye': True})
    else:
      words = ' '.join(str(error).split()) or type(error).__name__
      self._tell({'failed': words[:2000]})

  def _tell(self, message: Mapping, but: int = -1) -> None:
    for index, peer in list(self._others.items()):
      if index == but:
        continue
      try:
        with self._lock:
          peer.line.send(message)
      except OSError:
        continue  # its own listener finds that out, and names it

  def _beat(self) -> None:
    while not self._closed.wait(min(2.0, self._timeout / 5)):
      self._tell({'beat': True})

  def _listen(self, peer: Peer) -> None:
    last = looked = time.monotonic()
    while True:
      messages = peer.line.receive(min(1.0, self._timeout / 5))
      now = time.monotonic()
      if now - looked > self._timeout / 2:
        last = now  # it was this process that slept
      looked = now
      if messages is None:
        if not self._closed.is_set():
          self._lost(peer, 'has gone without a word: it was killed, or its machine is lost')
        return
      if messages:
        last = now
      for message in messages:
        if 'bye' in message:
          return
        if 'failed' in message:
          self._ended(peer, f'ended: {message["failed"]}')
          return
        if 'lost' in message:
          self._speak(str(message['lost']))
          return
      if now - last > self._timeout and not self._closed.is_set():
        self._lost(
          peer,
          f'has not answered for {now - last:.0f} s: it is stopped, or its machine or network is '
          'lost',
        )
        return

  def _ended(self, peer: Peer, how: str) -> None:
    """Another process ended with an error, which this one may be about to meet itself."""
    if not self._closed.wait(_GRACE):
      self._lost(peer, how)

  def _lost(self, peer: Peer, how: str) -> None:
    name = f'{peer.index} of {self._count} ({peer.host}, pid {peer.pid})'
    words = (
      f'Process {name} {how}. All others end too; the same command continues from the newest '
      'checkpoint.'
    )
    self._tell({'lost': words}, but=peer.index)
    self._speak(words)

  def _speak(self, words: str) -> None:
    with self._ending:
      if self._closed.is_set() and self._end is _end_the_process:
        # The main thread is on its way out, and may wait for the lost one there for ever.
        time.sleep(_GRACE)
      self._end(words)


def _end_the_process(words: str) -> None:
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, ValueError):
      continue  # nobody reads it
  # Past Python's streams: the main thread may hold them.
  os.write(2, f'\nerror: {visible(words)}\n'.encode())
  os._exit(PeerLost.exit_code)
