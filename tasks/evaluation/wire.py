"""Values between two processes of which one is not trusted: judge.py and the program it judges.

Plain values (numbers, text, bytes, None, containers of the standard library, built-in classes) are
copied, whatever their nesting, aliases and circles. Subclasses arrive as what they derive from, so
that a comparison is always done by Python's own types. Anything else stays where it is and arrives
as a Remote: to be called, looked into, iterated over; equal to nothing but objects of its own side.
Containers given in a call are brought up to date when it returns. A message is JSON, read without
trust: one that breaks the rules ends the talk.
"""

from __future__ import annotations

import builtins
import collections
import decimal
import fractions
import json
import operator
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

_MAX_BYTES = 64 << 20
_CLASSES = {c.__name__: c for c in vars(builtins).values() if isinstance(c, type)}
_CLASSES |= {
  f'{c.__module__}.{c.__name__}': c
  for c in (
    collections.Counter,
    collections.OrderedDict,
    collections.defaultdict,
    collections.deque,
    decimal.Decimal,
    fractions.Fraction,
  )
}
_CLASS_NAMES = {c: name for name, c in _CLASSES.items()}

# Containers by the letter they travel under; the first that fits is taken.
_MAPPINGS = {'o': collections.OrderedDict, 'c': collections.Counter, 'd': dict}
_FROZEN = {'t': tuple, 'z': frozenset}
_MUTABLE = {**_MAPPINGS, 'q': collections.deque, 'l': list, 's': set, 'b': bytearray}

# What may be asked of an object besides calling it and its attributes.
QUESTIONS: dict[str, Callable] = {
  'bool': bool,
  'len': len,
  'str': str,
  'repr': repr,
  'iter': iter,
  'next': next,
  'getitem': operator.getitem,
  'setitem': operator.setitem,
}
# Between two objects of one side alone: what an object says of a plain value is not believed.
_COMPARISONS = ('eq', 'ne', 'lt', 'le', 'gt', 'ge', 'add', 'sub', 'mul')
QUESTIONS |= {name: getattr(operator, name) for name in _COMPARISONS}


class Broken(Exception):
  """The other side has ended, or does not keep to the rules."""


class Raised(Exception):
  """An exception of the other side that is not one of Python's own."""


class Remote:
  """An object of the other side."""

  __slots__ = ('_key', '_peer')

  def __init__(self, peer: Peer, key: int):
    object.__setattr__(self, '_peer', peer)
    object.__setattr__(self, '_key', key)

  def __call__(self, *args, **kwargs):
    return self._peer.request('call', self, args, kwargs)

  def __getattr__(self, name: str):
    if name.startswith('__'):
      raise AttributeError(name)
    return self._peer.request('get', self, name)

  def __setattr__(self, name: str, value):
    self._peer.request('set', self, name, value)

  def __hash__(self) -> int:
    return self._key

  def __instancecheck__(self, value) -> bool:
    return isinstance(value, Remote) and self._peer.request('isinstance', self, value)


def _add_questions() -> None:
  def make(name: str) -> Callable:
    def ask(self, *args):
      if name in _COMPARISONS and not (args and isinstance(args[0], Remote)):
        return NotImplemented
      return self._peer.request(name, self, *args)

    return ask

  for name in QUESTIONS:
    setattr(Remote, f'__{name}__', make(name))


_add_questions()


class _Packer:
  """Makes one message: values become atoms, containers numbered nodes."""

  def __init__(self, peer: Peer, known: Iterable[Any] = ()):
    self.peer = peer
    self.objects = list(known)  # by number; also keeps them alive, so that an id stays theirs
    self.nodes: list = [None] * len(self.objects)
    self._index = {id(value): i for i, value in enumerate(self.objects)}
    self._waiting = [i for i, value in enumerate(self.objects) if isinstance(value, _ANY_MUTABLE)]

  def values(self, values: Iterable[Any]) -> list:
    atoms = [self._atom(value) for value in values]
    while self._waiting:  # containers within containers, without recursion
      index = self._waiting.pop()
      self.nodes[index] = self._content(self.objects[index])
    return atoms

  def _content(self, value) -> list:
    letter = next(letter for letter, kind in _MUTABLE.items() if isinstance(value, kind))
    if letter == 'b':
      return [letter, value.hex()]
    if letter in _MAPPINGS:
      value = [part for pair in dict.items(value) for part in pair]
    return [letter, *(self._atom(part) for part in value)]

  def _number(self, value) -> int:
    self.objects.append(value)
    self.nodes.append(None)
    self._index[id(value)] = len(self.nodes) - 1
    return len(self.nodes) - 1

  def _atom(self, value):
    if value is None or value is True or value is False:
      return value
    if isinstance(value, str):
      return str.__str__(value)
    if isinstance(value, int):
      return int(value) if int.bit_length(value) < 64 else ['i', hex(value)]
    if isinstance(value, float):
      return float(value)
    if id(value) in self._index:
      return ['@', self._index[id(value)]]
    if isinstance(value, _ANY_MUTABLE):
      self._waiting.append(self._number(value))
      return ['@', self._index[id(value)]]
    for letter, kind in _FROZEN.items():
      if isinstance(value, kind):
        parts = [self._atom(part) for part in value]
        index = self._number(value)  # after its parts
        self.nodes[index] = [letter, *parts]
        return ['@', index]
    return self._rare(value)

  def _rare(self, value) -> list:
    if isinstance(value, complex):
      return ['c', value.real, value.imag]
    if isinstance(value, bytes):
      return ['y', value.hex()]
    if isinstance(value, range):
      return ['r', *map(self._atom, (value.start, value.stop, value.step))]
    if isinstance(value, fractions.Fraction):
      return ['f', hex(value.numerator), hex(value.denominator)]
    if isinstance(value, decimal.Decimal):
      return ['D', str(value)]
    if value is ...:
      return ['.']
    if isinstance(value, type) and value in _CLASS_NAMES:
      return ['n', _CLASS_NAMES[value]]
    if type(value) is Remote:
      return ['yours', value._key]
    if type(value).__module__ == 'numpy' and getattr(value, 'shape', None) == ():
      return self._atom(value.item())
    return ['mine', self.peer.export(value)]


_ANY_MUTABLE = tuple(_MUTABLE.values())


class _Unpacker:
  """Reads one message; wrong ones raise whatever they raise."""

  def __init__(self, peer: Peer, nodes: list, known: list):
    self.peer = peer
    self.objects: list = [None] * len(nodes)
    fresh = nodes[len(known) :]
    if len(known) > len(nodes):
      raise ValueError('fewer nodes than are known')
    for i, value in enumerate(known):
      self.objects[i] = value
      if isinstance(value, _ANY_MUTABLE) and not isinstance(value, _MUTABLE[nodes[i][0]]):
        raise ValueError('a container of another kind')
    for i, node in enumerate(fresh, len(known)):
      if node[0] in _MUTABLE:
        self.objects[i] = _MUTABLE[node[0]]()
    for i, node in enumerate(fresh, len(known)):
      if node[0] not in _MUTABLE:
        self.objects[i] = _FROZEN[node[0]](self.value(atom) for atom in node[1:])
    for value, node in zip(self.objects, nodes, strict=True):
      if isinstance(value, _ANY_MUTABLE):
        self._fill(value, node)

  def _fill(self, value, node: list) -> None:
    if node[0] == 'b':
      value[:] = bytes.fromhex(node[1])
      return
    parts = [self.value(atom) for atom in node[1:]]
    value.clear()
    if node[0] in _MAPPINGS:
      dict.update(value, zip(parts[::2], parts[1::2], strict=True))
    elif node[0] == 's':
      value.update(parts)
    else:
      value.extend(parts)

  def value(self, atom):
    if not isinstance(atom, list):
      if isinstance(atom, dict):
        raise ValueError('an atom that is a mapping')
      return atom
    tag, *rest = atom
    return getattr(self, f'_read_{_TAGS[tag]}')(*rest)

  def _read_reference(self, index):
    if index < 0:
      raise IndexError(index)
    return self.objects[index]

  def _read_int(self, text):
    return int(text, 16)

  def _read_complex(self, real, imaginary):
    return complex(real, imaginary)

  def _read_bytes(self, text):
    return bytes.fromhex(text)

  def _read_range(self, *numbers):
    return range(*map(self.value, numbers))

  def _read_fraction(self, numerator, denominator):
    return fractions.Fraction(int(numerator, 16), int(denominator, 16))

  def _read_decimal(self, text):
    return decimal.Decimal(text)

  def _read_ellipsis(self):
    return ...

  def _read_class(self, name):
    return _CLASSES[name]

  def _read_own(self, key):
    return self.peer.exported(key)

  def _read_remote(self, key):
    return self.peer.remote(key)


_TAGS = {
  '@': 'reference',
  'i': 'int',
  'c': 'complex',
  'y': 'bytes',
  'r': 'range',
  'f': 'fraction',
  'D': 'decimal',
  '.': 'ellipsis',
  'n': 'class',
  'yours': 'own',
  'mine': 'remote',
}


class Peer:
  """One end of a talk: asks the other side, and answers it while waiting.

  Args:
    reader: descriptor to read from.
    writer: descriptor to write to.
    serve: what this side does when asked: operation to function. What is not here is refused.
  """

  def __init__(self, reader: int, writer: int, serve: dict[str, Callable]):
    self.broken: str | None = None  # why nothing more is believed
    self._reader = os.fdopen(reader, 'rb')
    self._writer = os.fdopen(writer, 'wb')
    self._serve = serve
    self._exports: list = []
    self._keys: dict[int, int] = {}
    self._remotes: dict[int, Remote] = {}
    self._lock = threading.RLock()

  def export(self, value) -> int:
    if id(value) not in self._keys:
      self._keys[id(value)] = len(self._exports)
      self._exports.append(value)
    return self._keys[id(value)]

  def exported(self, key: int):
    if type(key) is not int or key < 0:
      raise ValueError('not a key')
    return self._exports[key]

  def remote(self, key: int) -> Remote:
    if type(key) is not int:
      raise ValueError('not a key')
    return self._remotes.setdefault(key, Remote(self, key))

  def request(self, name: str, *values):
    """Has the other side do something; returns or raises what that does.

    Raises:
      Broken: there is no answer to be had.
    """
    with self._lock:
      packer = _Packer(self)
      atoms = packer.values(values)
      self._send({'do': name, 'values': atoms, 'nodes': packer.nodes})
      while True:
        message = self._receive()
        if 'do' not in message:
          return self._answer(message, packer.objects)
        self._do(message)

  def answer_until_end(self) -> None:
    """Does what the other side asks, until it closes."""
    while True:
      try:
        message = self._receive()
      except Broken:
        return
      self._do(message)

  def fail(self, why: str) -> Broken:
    self.broken = self.broken or why
    return Broken(self.broken)

  def _believe(self, read: Callable, *args):
    """The result of reading what the other side sent."""
    try:
      return read(*args)
    except Exception as error:
      raise self.fail(f'the program breaks the rules: {error!r}'[:300]) from error

  def _answer(self, message: dict, known: list):
    def read():
      values = _Unpacker(self, message['nodes'], known)
      raised = message.get('raised')
      if raised and not all(isinstance(part, str) for part in raised):
        raise ValueError('not an exception')
      return values.value(message['value']), raised

    value, raised = self._believe(read)
    if raised:
      raise _exception(*raised)
    return value

  def _do(self, message: dict) -> None:
    def read():
      values = _Unpacker(self, message['nodes'], [])
      return [values.value(atom) for atom in message['values']], values.objects, message['do']

    values, known, name = self._believe(read)
    raised = result = None
    try:
      result = self._serve[name](*values)
    except Broken:
      raise
    # Whatever it is, SystemExit included, the other side is told and goes on.
    except BaseException as error:  # noqa: BLE001
      raised = [type(error).__name__, _text(error)]
    packer = _Packer(self, known)
    try:
      (atom,) = packer.values([result])
    except RecursionError as error:
      packer, atom, raised = _Packer(self, known), None, ['RecursionError', str(error)]
      packer.values([])
    answer = {'value': atom, 'nodes': packer.nodes}
    self._send(answer | ({'raised': raised} if raised else {}))

  def _send(self, message: dict) -> None:
    data = json.dumps(message, separators=(',', ':')).encode()
    try:
      self._writer.write(len(data).to_bytes(8, 'little') + data)
      self._writer.flush()
    except OSError as error:
      raise self.fail('the program ended before its end') from error

  def _receive(self) -> dict:
    if self.broken:
      raise Broken(self.broken)
    head = self._reader.read(8)
    size = int.from_bytes(head, 'little')
    if len(head) < 8:
      raise self.fail('the program ended before its end')
    if size > _MAX_BYTES:
      raise self.fail('the program returned more than 64 MiB')
    data = self._reader.read(size)
    if len(data) < size:
      raise self.fail('the program ended before its end')
    message = self._believe(json.loads, data)
    if not isinstance(message, dict):
      raise self.fail('the program breaks the rules: not a message')
    return message


def _text(error: BaseException) -> str:
  try:
    return str(error)[:500]
  except Exception:  # noqa: BLE001
    return ''


def _exception(name: str, text: str) -> Exception:
  """One of Python's own of that name if there is one; StopIteration and the like included."""
  kind = getattr(builtins, name, None)
  if isinstance(kind, type) and issubclass(kind, Exception):
    try:
      return kind(text)
    except TypeError:  # Unicode errors want more
      pass
  return Raised(f'{name}: {text}')
