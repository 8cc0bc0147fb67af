"""The pickle of a weight file, read as a list of instructions that build descriptions of tensors.

Python's own unpickler would look up names, call what it found, hash what it is told to, and make
room for any number it reads. This one knows some thirty instructions and seven names, takes texts
and numbers alone as keys, and its memory and time grow with the length of the pickle only.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.core.tensors import BFLOAT16

_MOST_STEPS = 8 << 20
_STORAGES = {
  'FloatStorage': np.dtype(np.float32),
  'BFloat16Storage': BFLOAT16,
  'HalfStorage': np.dtype(np.float16),
  'DoubleStorage': np.dtype(np.float64),
  'LongStorage': np.dtype(np.int64),
}


class PickleError(ValueError):
  """A pickle that holds more than tensors, or none at all."""


@dataclasses.dataclass(frozen=True)
class Storage:
  """A run of numbers in an entry of the archive."""

  key: str
  dtype: np.dtype
  elements: int


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A view of a storage.

  Attributes:
    key, dtype, elements: of the storage.
    offset, strides: in elements.
  """

  key: str
  dtype: np.dtype
  elements: int
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Mark:
  """Where a list of values begins on the stack."""


def _tensor(arguments: tuple) -> Tensor:
  storage, offset, shape, strides, *_ = arguments  # the rest is requires_grad and hooks
  if not isinstance(storage, Storage):
    raise PickleError('a tensor without a storage')
  for sizes in ((offset,), shape, strides):
    if not all(type(n) is int and abs(n) < 1 << 62 for n in sizes):
      raise PickleError('a tensor whose sizes are no numbers')
  return Tensor(storage.key, storage.dtype, storage.elements, offset, tuple(shape), tuple(strides))


def _parameter(arguments: tuple) -> Any:
  return arguments[0]


def _ordered(arguments: tuple) -> dict:
  if arguments not in ((), ([],)):
    raise PickleError('an OrderedDict with arguments')
  return {}


_CALLS: dict[str, Callable[[tuple], Any]] = {
  'collections OrderedDict': _ordered,
  'torch._utils _rebuild_tensor_v2': _tensor,
  'torch._utils _rebuild_parameter': _parameter,
}


def _storage(pid: Any) -> Storage:
  if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == 'storage'):
    raise PickleError('an unknown kind of reference')
  _, dtype, key, _, elements = pid
  if not (isinstance(dtype, np.dtype) and type(elements) is int and isinstance(key, str)):
    raise PickleError('an unknown kind of storage')
  return Storage(key, dtype, elements)


def _found(name: str) -> Any:
  """What a name of a module stands for.

  Raises:
    PickleError: it is not one of the seven.
  """
  module, _, what = name.partition(' ')
  if module == 'torch' and what in _STORAGES:
    return _STORAGES[what]
  if name not in _CALLS:
    raise PickleError(f'it asks for {module[:80]}.{what[:80]}, which no weight file needs')
  return _CALLS[name]


_NUMBERS = {'INT', 'LONG', 'LONG1', 'LONG4', 'BININT', 'BININT1', 'BININT2', 'FLOAT', 'BINFLOAT'}
_LITERALS = _NUMBERS | {'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'UNICODE'}
_MADE = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Machine:
  """The stack and the memory of a pickle."""

  def __init__(self):
    self.stack: list[Any] = []
    self.memory: dict[int, Any] = {}

  def since_mark(self) -> list[Any]:
    at = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _Mark)
    values = self.stack[at + 1 :]
    del self.stack[at:]
    return values

  def set_items(self, items: list[Any]) -> None:
    target = self.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
      raise PickleError('items for what is no dict')
    for key, value in zip(items[::2], items[1::2], strict=True):
      # A tuple of tuples of tuples may take for ever to hash.
      if not isinstance(key, (str, int)):
        raise PickleError(f'a key that is a {type(key).__name__}')
      target[key] = value

  def append(self, values: list[Any]) -> None:
    if not isinstance(self.stack[-1], list):
      raise PickleError('values for what is no list')
    self.stack[-1].extend(values)

  def call(self) -> Any:
    arguments, what = self.stack.pop(), self.stack.pop()
    if not callable(what) or isinstance(what, np.dtype) or not isinstance(arguments, tuple):
      raise PickleError('a call of what is no function')
    return what(arguments)

  def step(self, name: str, argument: Any) -> None:
    """One instruction.

    Raises:
      PickleError: it is none of those that weight files need.
    """
    stack = self.stack
    if name in _LITERALS:
      stack.append(argument)
    elif name in _MADE:
      stack.append(_MADE[name])
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name in _TUPLES:
      values = stack[-_TUPLES[name] :]
      del stack[-_TUPLES[name] :]
      stack.append(tuple(values))
    elif name in ('BINPUT', 'LONG_BINPUT'):
      self.memory[argument] = stack[-1]
    elif name == 'MEMOIZE':
      self.memory[len(self.memory)] = stack[-1]
    elif name in ('BINGET', 'LONG_BINGET'):
      stack.append(self.memory[argument])
    elif name == 'MARK':
      stack.append(_Mark)
    elif name == 'TUPLE':
      stack.append(tuple(self.since_mark()))
    elif name in ('SETITEM', 'SETITEMS'):
      items = self.since_mark() if name == 'SETITEMS' else [stack.pop(-2), stack.pop()]
      self.set_items(items)
    elif name in ('APPEND', 'APPENDS'):
      self.append(self.since_mark() if name == 'APPENDS' else [stack.pop()])
    elif name == 'GLOBAL':
      stack.append(_found(argument))
    elif name == 'STACK_GLOBAL':
      what, module = stack.pop(), stack.pop()
      if not (isinstance(module, str) and isinstance(what, str)):
        raise PickleError('a name that is no text')
      stack.append(_found(f'{module} {what}'))
    elif name == 'BINPERSID':
      stack.append(_storage(stack.pop()))
    elif name == 'REDUCE':
      stack.append(self.call())
    elif name == 'BUILD':
      stack.pop()  # attributes, such as the _metadata of a state_dict
    elif name not in ('PROTO', 'FRAME', 'STOP'):
      raise PickleError(f'it has the instruction {name}, which no weight file needs')


def read_pickle(content: bytes) -> Any:
  """The value of a pickle, with a Tensor for every tensor.

  Raises:
    PickleError: it is damaged, or has instructions or names that no weight file needs.
  """
  machine = _Machine()
  try:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
      if count > _MOST_STEPS:
        raise PickleError(f'more than {_MOST_STEPS} instructions')
      machine.step(opcode.name, argument)
    (value,) = machine.stack
  except PickleError:
    raise
  except (ValueError, IndexError, KeyError, TypeError, StopIteration, OverflowError) as error:
    raise PickleError(f'it is damaged ({type(error).__name__}: {error})') from error
  return value
