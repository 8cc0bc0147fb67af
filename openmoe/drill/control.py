"""The negative control: a run that goes on from a checkpoint of which one bit is another.

What it is compared with must be found to differ; a comparison that does not see it sees nothing.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.checkpoint.paths import checkpoint_name, step_of
from openmoe.train_step import abstract_state


def alter_a_bit(
  source: pathlib.Path, target: pathlib.Path, step: int, arguments: Mapping[str, Any]
) -> str:
  """Copies a run as it was at a checkpoint, with one parameter altered in its last bit.

  Args:
    source: run directory.
    target: new run directory.
    step: of the checkpoint.
    arguments: of train(), of the run.

  Returns:
    What was altered, in words.
  """
  shutil.copytree(source, target, ignore=_other_checkpoints)
  abstract, _ = abstract_state(arguments['model'], arguments['optimizer'])
  reader = Checkpointer(source, 1, identity(arguments['model']), read_only=True)
  with reader, Checkpointer(target, 1, identity(arguments['model'])) as writer:
    state, positions, metadata = reader.restore(step, abstract)
    leaves, tree = jax.tree.flatten(state.params)
    paths = [
      jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
    ]
    where = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[where] = jax.device_put(_flipped(np.asarray(leaves[where])))
    state = state.replace(params=jax.tree.unflatten(tree, leaves))
    writer.save(step, state, dict(positions), metadata)
    writer.wait()
  return f'the last bit of one number of {paths[where]} in {checkpoint_name(step)}'


def _other_checkpoints(folder: str, names: list[str]) -> list[str]:
  return [name for name in names if step_of(name) is not None or name == 'tensorboard']


def _flipped(array: np.ndarray) -> np.ndarray:
  """The array with the lowest bit of its largest number turned."""
  array = np.array(array)
  bits = array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])
  place = np.unravel_index(np.argmax(np.abs(array)), array.shape)
  bits[place] ^= 1
  return array
