"""What one process finds out, told to all: an error of the first is an error of everybody."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from openmoe.config import ConfigError

_BYTES = 4096  # of a message
T = TypeVar('T')


def in_first(act: Callable[[], T]) -> T | None:
  """What `act` returns in process 0, and None elsewhere.

  Raises:
    ConfigError: in every process, where it was raised in process 0.
  """
  found, error = None, None
  if jax.process_index() == 0:
    try:
      found = act()
    except ConfigError as caught:
      error = caught
  if jax.process_count() > 1:
    told = broadcast_text('' if error is None else str(error))
    if told and error is None:
      raise ConfigError(told)
  if error is not None:
    raise error
  return found


def broadcast_text(text: str) -> str:
  """The text of process 0, in all; cut after some thousand characters."""
  content = np.zeros(_BYTES, np.uint8)
  encoded = text.encode()[:_BYTES]
  content[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  told = np.asarray(multihost_utils.broadcast_one_to_all(content))
  return told.tobytes().rstrip(b'\0').decode('utf-8', 'ignore')
