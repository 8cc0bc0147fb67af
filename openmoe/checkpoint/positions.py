"""The positions of the data streams as an item of a checkpoint, beside its arrays.

A position is an opaque byte string per logical shard of the data; what is in it is the business of
openmoe/data. Every process writes the files of its own shards, and any process can read all.
"""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Iterator, Mapping

import orbax.checkpoint as ocp
from etils import epath

_SUFFIX = '.position'  # ends the name of an entry's file; orbax puts marks of its own beside them


class DataPositions(Mapping[str, bytes]):
  """The data entries of a checkpoint; each is read when asked for.

  A process needs only its own few of possibly hundreds. Read them before the next save, which may
  delete this checkpoint.
  """

  def __init__(self, directory: epath.Path):
    self._paths = {
      urllib.parse.unquote(path.name.removesuffix(_SUFFIX)): path
      for path in directory.iterdir()
      if path.name.endswith(_SUFFIX)
    }

  def __getitem__(self, name: str) -> bytes:
    return self._paths[name].read_bytes()

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._paths))

  def __len__(self) -> int:
    return len(self._paths)


class DataPositionsHandler(ocp.AsyncCheckpointHandler):
  """Writes byte strings as files; every process writes the ones it is given.

  Part of orbax's protocol, so the files are committed with the arrays or not at all.
  """

  @classmethod
  def typestr(cls) -> str:
    """The name that checkpoints carry, whatever file the class lies in."""
    return 'openmoe.data_positions.DataPositionsHandler'

  async def async_save(self, directory: epath.Path, args: SaveDataPositions):
    async def write():
      for name, content in args.entries.items():
        (directory / (urllib.parse.quote(name, safe='') + _SUFFIX)).write_bytes(content)

    return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name='data_positions')]

  def save(self, directory: epath.Path, args: SaveDataPositions):
    raise NotImplementedError('Data positions are only written asynchronously.')

  def restore(self, directory: epath.Path, args: RestoreDataPositions) -> DataPositions:
    del args
    return DataPositions(directory)


@ocp.args.register_with_handler(DataPositionsHandler, for_save=True)
@dataclasses.dataclass
class SaveDataPositions(ocp.args.CheckpointArgs):
  entries: Mapping[str, bytes]


@ocp.args.register_with_handler(DataPositionsHandler, for_restore=True)
@dataclasses.dataclass
class RestoreDataPositions(ocp.args.CheckpointArgs):
  pass
