"""Imports TensorFlow without its greetings.

TensorFlow 2.21 prints two notices about absent CUDA libraries before any of its log settings are
read; a stranger takes them for errors. What it writes during import is held back, and printed only
if the import fails.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')


def import_tensorflow() -> None:
  """Loads TensorFlow with the standard error of its C++ side held back."""
  sys.stderr.flush()
  terminal = os.dup(2)
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      importlib.import_module('tensorflow')
    except BaseException:
      held.seek(0)
      os.write(terminal, held.read())
      raise
    finally:
      os.dup2(terminal, 2)
      os.close(terminal)
