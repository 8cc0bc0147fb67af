"""Mutations of real files: bytes at random, and JSON values of other types, sizes and depths."""

from __future__ import annotations

import json
import random

_NUMBERS = (
  0,
  -1,
  1,
  2**31,
  2**63,
  -(2**63),
  10**18,
  10**30,
  0.5,
  1e308,
  float('nan'),
  float('inf'),
)
_TEXTS = ('', '..', '../../x', '/dev/zero', '\x1b[2J', '\u202e', 'a' * 5000, '\0', 'float64', 'NaN')
_OTHERS = (None, True, [], {}, [[]], {'a': {}}, [None] * 3)


def of_bytes(content: bytes, dice: random.Random) -> bytes:
  """The file with a few bytes flipped, cut, repeated, put in or replaced by extreme numbers."""
  data = bytearray(content)
  for _ in range(dice.choice((1, 1, 2, 8))):
    at = dice.randrange(len(data)) if data else 0
    length = min(dice.choice((1, 2, 4, 8, 64, 1024)), len(data) - at)
    match dice.randrange(6):
      case 0 if data:
        data[at] ^= 1 << dice.randrange(8)
      case 1:
        del data[at : at + length]
      case 2:
        data[at:at] = data[at : at + length]
      case 3:
        data[at:at] = dice.randbytes(length)
      case 4:
        data[at : at + length] = dice.choice((b'\xff', b'\0', b'\x7f')) * length
      case _:
        data = data[:at]
  return bytes(data)


def of_json(value, dice: random.Random):
  """A JSON value with one part of it, at any depth, made another."""
  if isinstance(value, (dict, list)) and value and dice.random() < 0.85:
    copy = value.copy()
    key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match dice.randrange(8):
      case 0:
        del copy[key]
      case 1 if isinstance(copy, dict):
        copy[dice.choice(_TEXTS)] = copy[key]
      case _:
        copy[key] = of_json(value[key], dice)
    return copy
  match dice.randrange(5):
    case 0:
      return dice.choice(_TEXTS)
    case 1:
      return dice.choice(_OTHERS)
    case 2:
      return {'a': value}
    case _:
      return dice.choice(_NUMBERS)


def of_file(content: bytes, dice: random.Random) -> bytes:
  """A mutation of a file; where it is JSON, of its values as often as of its bytes."""
  deep = b'{"a":' * 100_000
  if dice.random() < 0.01:
    return dice.choice((b'', b'[]', b'null', b'5', b'""', deep, b'\xff' * 100))
  lines = content.split(b'\n')
  if len(lines) > 2 and dice.random() < 0.5:  # one of JSON, among others
    place = dice.randrange(len(lines))
    if lines[place][:1] in (b'{', b'['):
      lines[place] = of_file(lines[place], dice)
      return b'\n'.join(lines)
  try:
    value = json.loads(content)
  except ValueError:
    return of_bytes(content, dice)
  if dice.random() < 0.3:
    return of_bytes(content, dice)
  for _ in range(dice.choice((1, 1, 3))):
    value = of_json(value, dice)
  return json.dumps(value).encode()
