"""The roll call of the processes of a run, before any of them uses a device.

Process 0 listens where JAX will meet afterwards, the others call in and say who they are and what
they are about to run. Whoever is absent is named, whatever differs is told to all, and nobody
trains unless all are there, the same, and see one run directory. The connections stay: peers.py
watches over them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import selectors
import socket
import time
import uuid
from collections.abc import Mapping

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable, absolute
from openmoe.config import ConfigError
from openmoe.running.cluster import Place

_LONGEST = 16 << 20  # bytes of a message
_TOLD = 8  # differences that a message lists
_SEEN_WITHIN = 20.0  # seconds within which a shared file system shows a new file


class PeerLost(RuntimeError):
  """Another process of this run is absent, or does not answer any more."""

  exit_code = 69  # EX_UNAVAILABLE


class Line:
  """A connection that carries one JSON object a line."""

  def __init__(self, connection: socket.socket):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self.connection = connection
    self._received = b''

  def send(self, message: Mapping) -> None:
    """Raises OSError when nobody is there any more."""
    self.connection.settimeout(10.0)
    self.connection.sendall(json.dumps(message).encode() + b'\n')

  def receive(self, seconds: float) -> list[dict] | None:
    """The messages that have come within so long; None when the other end has gone."""
    self.connection.settimeout(max(0.001, seconds))
    try:
      content = self.connection.recv(1 << 16)
    except TimeoutError:
      return []
    except OSError:
      return None
    if not content:
      return None
    *lines, self._received = (self._received + content).split(b'\n')
    if len(self._received) > _LONGEST:
      return None
    try:
      return [safe_json.parse(line, 'what another process says') for line in lines]
    except Unreadable:
      return None

  def one(self, deadline: float) -> dict | None:
    """The next message before a deadline; None when there is none."""
    while (left := deadline - time.monotonic()) > 0:
      messages = self.receive(min(left, 1.0))
      if messages is None:
        return None
      if messages:
        return messages[0]
    return None

  def close(self) -> None:
    self.connection.close()


@dataclasses.dataclass
class Peer:
  """Another process and the connection to it."""

  index: int
  host: str
  pid: int
  line: Line

  def __str__(self) -> str:
    return f'process {self.index} ({self.host}, pid {self.pid})'


def _me(place: Place) -> dict:
  return {
    'index': place.index,
    'count': place.count,
    'host': platform.node(),
    'pid': os.getpid(),
  }


def meet(place: Place, facts: Mapping[str, str], model_dir: str, timeout: float) -> list[Peer]:
  """The other processes, once all are there and the same: of process 0 all, of others process 0.

  Args:
    facts: what must be the same in all; name -> value.
    model_dir: run directory, which all must see.
    timeout: seconds that the others are waited for.

  Raises:
    PeerLost: somebody did not come, in every process.
    ConfigError: the processes differ, in every process.
  """
  if place.count == 1:
    return []
  deadline = time.monotonic() + timeout
  if place.index:
    return [_call_in(place, facts, model_dir, deadline, timeout)]
  return _call_the_roll(place, facts, model_dir, deadline, timeout)


# --- the others


def _call_in(
  place: Place, facts: Mapping[str, str], model_dir: str, deadline: float, timeout: float
) -> Peer:
  line = _connect(place, deadline, timeout)
  try:
    line.send(_me(place) | {'facts': dict(facts)})
    answer = _answer(line, place, deadline + 5.0)
    line.send({'seen': _appears(model_dir, answer.get('token', ''))})
    last = _answer(line, place, time.monotonic() + _SEEN_WITHIN + 30.0)
  except OSError as error:
    raise PeerLost(f'Process 0 of {place.count} at {place.address} went away: {error}.') from error
  return Peer(0, str(last.get('host')), int(last.get('pid', 0)), line)


def _connect(place: Place, deadline: float, timeout: float) -> Line:
  problem: object = ''
  while time.monotonic() < deadline:
    try:
      return Line(socket.create_connection((place.host, place.port), timeout=5.0))
    except OSError as error:
      problem = error
      time.sleep(0.2)
  raise PeerLost(
    f'Process 0 of {place.count} did not answer at {place.address} within {timeout:.0f} s '
    f'({problem}): it is not running, or cannot be reached from {platform.node()}. Start it, '
    'check --coordinator_address, or wait longer with --initialization_timeout.'
  )


def _answer(line: Line, place: Place, deadline: float) -> dict:
  answer = line.one(deadline)
  if answer is None:
    raise PeerLost(f'Process 0 of {place.count} at {place.address} went away in the roll call.')
  if 'refused' in answer:
    kind = ConfigError if answer.get('code') == ConfigError.exit_code else PeerLost
    raise kind(str(answer['refused']))
  return answer


def _mark(model_dir: str, token: str):
  return absolute(model_dir) / f'.roll_call_{token}'


def _appears(model_dir: str, token: str) -> bool:
  """Whether the file that process 0 has made is seen here too."""
  if not token.isalnum():
    return False
  deadline = time.monotonic() + _SEEN_WITHIN
  while True:
    try:
      # Listing the directory makes a network file system look again.
      if any(path.name == f'.roll_call_{token}' for path in absolute(model_dir).iterdir()):
        return True
    except OSError:
      if _mark(model_dir, token).exists():
        return True
    if time.monotonic() > deadline:
      return False
    time.sleep(0.5)


# --- process 0


def _call_the_roll(
  place: Place, facts: Mapping[str, str], model_dir: str, deadline: float, timeout: float
) -> list[Peer]:
  peers: dict[int, Peer] = {}
  told: dict[int, dict] = {}
  try:
    _listen(place, deadline, peers, told)
    missing = [i for i in range(1, place.count) if i not in peers]
    if missing:
      names = ', '.join(map(str, missing[:20])) + (' ...' if len(missing) > 20 else '')
      here = ', '.join(map(str, peers.values())) or 'nobody else'
      raise PeerLost(
        f'Of {place.count} processes, {names} did not call in within {timeout:.0f} s at '
        f'{place.address}; there were process 0 ({platform.node()}) and {here}. Start the missing '
        'ones, or wait longer with --initialization_timeout.'
      )
    _compare(facts, peers, told)
    _share(model_dir, peers)
  except (ConfigError, PeerLost) as error:
    for peer in peers.values():
      _send(peer, {'refused': str(error), 'code': error.exit_code})
    raise
  for peer in peers.values():
    _send(peer, {'go': True} | _me(place))
  return [peers[i] for i in sorted(peers)]


def _listen(place: Place, deadline: float, peers: dict[int, Peer], told: dict[int, dict]) -> None:
  """Takes calls until all are there or the time is over."""
  try:
    server = socket.create_server(('', place.port), backlog=1024)
  except OSError as error:
    raise ConfigError(
      f'Process 0 cannot listen at port {place.port} ({error}): another program has it. Set '
      'another --coordinator_address.'
    ) from error
  with server, selectors.DefaultSelector() as waiting:
    waiting.register(server, selectors.EVENT_READ)
    while len(peers) < place.count - 1 and (left := deadline - time.monotonic()) > 0:
      for key, _ in waiting.select(min(left, 1.0)):
        if key.fileobj is server:
          line = Line(server.accept()[0])
          waiting.register(line.connection, selectors.EVENT_READ, line)
          continue
        messages = key.data.receive(0.1)
        if messages == []:
          continue
        waiting.unregister(key.fileobj)
        if messages is None:
          key.data.close()  # a stranger, or one that has given up
        else:
          _take(place, key.data, messages[0], peers, told)


def _take(place: Place, line: Line, said: dict, peers: dict[int, Peer], told: dict[int, dict]):
  """Adds a process that has called in.

  Raises:
    ConfigError: it counts otherwise, or another one has its index.
  """
  index, count, facts = said.get('index'), said.get('count'), said.get('facts')
  if type(index) is not int or not isinstance(facts, dict):
    line.close()  # no process of ours
    return
  peer = Peer(index, str(said.get('host')), int(said.get('pid') or 0), line)
  known = peers.get(index)
  peers[index], told[index] = peer, facts
  if count != place.count or not 0 < index < place.count:
    raise ConfigError(
      f'{_capital(peer)} says it is {index} of {count}, and process 0 that there are '
      f'{place.count}: give all the same --process_count.'
    )
  if known is not None:
    _send(known, {'refused': f'{_capital(peer)} has the same index.', 'code': 64})
    raise ConfigError(f'{_capital(known)} and {peer} have the same --process_index.')


def _capital(peer: Peer) -> str:
  return str(peer).capitalize() if str(peer).islower() else f'P{str(peer)[1:]}'


def _send(peer: Peer, message: Mapping) -> None:
  try:
    peer.line.send(message)
  except OSError:
    peer.line.close()  # it has gone by itself, which its silence will tell


def _compare(facts: Mapping[str, str], peers: dict[int, Peer], told: dict[int, dict]) -> None:
  """Raises ConfigError where a process is about to run something else than process 0."""
  found = []
  for index, peer in sorted(peers.items()):
    theirs = told[index]
    names = sorted(n for n in facts.keys() | theirs.keys() if facts.get(n) != theirs.get(n))
    for name in names:
      here, there = facts.get(name, 'absent'), theirs.get(name, 'absent')
      found.append(f'{name} is {here} in process 0 ({platform.node()}) and {there} in {peer}')
  if found:
    more = f'; and {len(found) - _TOLD} more' if len(found) > _TOLD else ''
    raise ConfigError(
      f'The processes of this run differ: {"; ".join(found[:_TOLD])}{more}. Give all the same '
      'configuration, code and data.'
    )


def _share(model_dir: str, peers: dict[int, Peer]) -> None:
  """Raises ConfigError where a process does not see what process 0 writes to the run directory."""
  token = uuid.uuid4().hex
  mark = _mark(model_dir, token)
  try:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_bytes(b'')
  except OSError as error:
    raise ConfigError(
      f'The run directory {mark.parent} cannot be used: {error}. Set MODEL_DIR to a place that '
      'can be written.'
    ) from error
  try:
    for peer in peers.values():
      _send(peer, {'token': token})
    for peer in peers.values():
      said = peer.line.one(time.monotonic() + _SEEN_WITHIN + 10.0)
      if said is None:
        raise PeerLost(f'{_capital(peer)} went away in the roll call.')
      if not said.get('seen'):
        raise ConfigError(
          f'{_capital(peer)} does not see what process 0 ({platform.node()}) writes to '
          f'{mark.parent}: MODEL_DIR is not shared. Set it to a directory that all hosts mount, or '
          'to gs://.'
        )
  finally:
    mark.unlink(missing_ok=True)
