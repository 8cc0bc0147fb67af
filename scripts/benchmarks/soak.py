"""A server under many clients: python -m scripts.benchmarks.soak --checkpoint=X [--seconds=120].

Starts `scripts.serve` and talks to it as 64 clients do: each asks again and again, some streaming,
some that hang up in the middle. Checks that every whole answer is the one that the same request got
alone, that nothing fails, that memory of the server stays, that those who hung up free their slots,
that more than the queue takes is 429 with Retry-After, and that SIGTERM lets answers under way end.
Prints one JSON line; exit code 1 where a check fails.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

GROWTH_GOAL = 0.05
_WAIT = 600  # seconds for an answer on a busy machine


def post(port: int, body: dict[str, Any]) -> tuple[int, Any, str | None]:
  """(status, content, Retry-After) of a completion."""
  line = http.client.HTTPConnection('127.0.0.1', port, timeout=_WAIT)
  try:
    line.request('POST', '/v1/completions', json.dumps(body))
    answer = line.getresponse()
    return answer.status, json.loads(answer.read()), answer.headers['retry-after']
  finally:
    line.close()


def streamed(port: int, body: dict[str, Any]) -> str:
  """The text of a streamed answer."""
  line = http.client.HTTPConnection('127.0.0.1', port, timeout=_WAIT)
  try:
    line.request('POST', '/v1/completions', json.dumps(body | {'stream': True}))
    answer = line.getresponse()
    if answer.status != 200:
      raise OSError(f'{answer.status}: {answer.read()[:200]!r}')
    pieces = [part.removeprefix('data: ') for part in answer.read().decode().split('\n\n') if part]
    if pieces[-1] != '[DONE]':
      raise OSError(f'the stream ended with {pieces[-1]!r}')
    return ''.join(json.loads(piece)['choices'][0]['text'] for piece in pieces[:-1])
  finally:
    line.close()


def hang_up(port: int, body: dict[str, Any]) -> None:
  """Asks for a stream and is gone before its end."""
  content = json.dumps(body | {'stream': True, 'max_tokens': 200})
  with socket.create_connection(('127.0.0.1', port), timeout=_WAIT) as line:
    head = 'POST /v1/completions HTTP/1.1\r\nHost: soak\r\n'
    line.sendall(f'{head}Content-Length: {len(content)}\r\n\r\n{content}'.encode())
    line.recv(64)


def resident(pid: int) -> int:
  """Bytes of memory of a process."""
  fields = pathlib.Path(f'/proc/{pid}/statm').read_text(encoding='utf-8').split()
  return int(fields[1]) * os.sysconf('SC_PAGE_SIZE')


def facts(port: int) -> dict[str, Any]:
  """What /health says."""
  line = http.client.HTTPConnection('127.0.0.1', port, timeout=_WAIT)
  try:
    line.request('GET', '/health')
    return json.loads(line.getresponse().read())
  finally:
    line.close()


class Clients:
  """Many clients for some time.

  Attributes:
    counts: of answers by what became of them.
    errors: what went wrong.
  """

  def __init__(self, port: int, asks: list[dict[str, Any]], expected: list[str]):
    self._port, self._asks, self._expected = port, asks, expected
    self.counts: collections.Counter[str] = collections.Counter()
    self.errors: list[str] = []
    self._lock = threading.Lock()

  def run(self, clients: int, seconds: float, pid: int) -> list[int]:
    """Memory of the server, once a second."""
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=self._one, args=(i, end)) for i in range(clients)]
    for thread in threads:
      thread.start()
    memory = []
    while time.monotonic() < end:
      memory.append(resident(pid))
      time.sleep(1)
    for thread in threads:
      thread.join()
    return memory

  def _one(self, number: int, end: float) -> None:
    draw = random.Random(number)
    while time.monotonic() < end:
      which = draw.randrange(len(self._asks))
      way = draw.choices(('whole', 'stream', 'gone'), (6, 3, 1))[0]
      try:
        self._ask(way, which)
      except (OSError, ValueError, http.client.HTTPException) as error:
        with self._lock:
          self.errors.append(f'{way}: {type(error).__name__}: {error}')

  def _ask(self, way: str, which: int) -> None:
    ask, text = self._asks[which], None
    if way == 'gone':
      hang_up(self._port, ask)
    elif way == 'stream':
      text = streamed(self._port, ask)
    else:
      status, found, _ = post(self._port, ask)
      if status != 200:
        raise OSError(f'{status}: {found}')
      text = found['choices'][0]['text']
    with self._lock:
      self.counts[way] += 1
      if text is not None and text != self._expected[which]:
        self.counts['different'] += 1


def start(args: argparse.Namespace) -> tuple[subprocess.Popen, int]:
  """A server and its port."""
  command = [sys.executable, '-m', 'scripts.serve', f'--checkpoint={args.checkpoint}', '--port=0']
  command += [f'--slots={args.slots}', f'--max_queue={2 * args.clients}', '--max_length=512']
  server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding='utf-8')
  for line in iter(server.stdout.readline, ''):
    if 'is served at http://' in line:
      return server, int(line.split('http://')[1].split('/')[0].rpartition(':')[2])
  raise SystemExit('The server did not start.')


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--checkpoint', default='runs/openmoe_tiny', help='what to serve')
  parser.add_argument('--clients', type=int, default=64)
  parser.add_argument('--seconds', type=float, default=120)
  parser.add_argument('--warm_seconds', type=float, default=15, help='before memory counts')
  parser.add_argument('--slots', type=int, default=16)
  args = parser.parse_args(argv)
  server, port = start(args)
  try:
    found = soak(args, server, port)
  finally:
    if server.poll() is None:
      server.kill()
    server.wait()
  print(json.dumps(found))
  return int(not found['met'])


def soak(args: argparse.Namespace, server: subprocess.Popen, port: int) -> dict[str, Any]:
  """All checks on a server that runs."""
  words = ('import os', 'The', 'def f(x):', 'Once upon a time there was', 'a b c d e f g h')
  asks = [
    {'prompt': words[i % 5] * (1 + i % 3), 'max_tokens': 8 + i, 'temperature': i % 2, 'seed': i}
    for i in range(12)
  ]
  expected = [post(port, ask)[1]['choices'][0]['text'] for ask in asks]  # alone
  Clients(port, asks, expected).run(args.clients, args.warm_seconds, server.pid)
  clients = Clients(port, asks, expected)
  memory = clients.run(args.clients, args.seconds, server.pid)
  until = time.monotonic() + 60
  load = facts(port)
  while load['waiting'] + load['reading'] + load['answering'] and time.monotonic() < until:
    time.sleep(0.1)
    load = facts(port)
  idle = load['waiting'] + load['reading'] + load['answering'] == 0
  status, _, again = post(port, {'prompt': ['a'] * 64, 'n': 16, 'max_tokens': 4})
  ended = _drains(server, port)
  tenth = max(len(memory) // 10, 1)
  grown = sum(memory[-tenth:]) / sum(memory[:tenth]) - 1
  checks = {
    'no_error': not clients.errors,
    'equal': clients.counts['different'] == 0,
    'memory_flat': abs(grown) <= GROWTH_GOAL,
    'slots_are_free': idle,
    'overload_is_429': status == 429 and again is not None and int(again) >= 1,
    'sigterm_drains': ended,
  }
  return {
    'clients': args.clients,
    'seconds': args.seconds,
    'answers': dict(clients.counts),
    'errors': clients.errors[:5],
    'memory_mib': [memory[0] >> 20, max(memory) >> 20, memory[-1] >> 20],
    'memory_growth': round(grown, 4),
    **checks,
    'met': all(checks.values()),
  }


def _drains(server: subprocess.Popen, port: int) -> bool:
  """Whether an answer that is under way at SIGTERM comes whole, and the server ends with 0."""
  found: list[Any] = []
  body = {'prompt': 'import', 'max_tokens': 100, 'temperature': 0}
  client = threading.Thread(target=lambda: found.append(post(port, body)))
  client.start()
  while client.is_alive() and not facts(port)['answering']:
    time.sleep(0.005)
  server.send_signal(signal.SIGTERM)
  client.join()
  return server.wait(_WAIT) == 0 and bool(found) and found[0][0] == 200


if __name__ == '__main__':
  raise SystemExit(main())
