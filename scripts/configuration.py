"""The configuration of a training run from its gin flags, or the tiny twin of it."""

from __future__ import annotations

from absl import flags

from openmoe.drill import twin
from scripts import data_flags, gin_flags

_TINY = flags.DEFINE_bool(
  'tiny', False, 'Train a tiny twin of the configuration: the same in kind, seconds on a CPU.'
)
TINY_STEPS = flags.DEFINE_integer('tiny_steps', twin.STEPS, 'Steps of the tiny twin.', 1)


def configure(tiny: bool | None = None) -> dict:
  """Arguments of openmoe.train.train from the gin flags, all validated.

  Args:
    tiny: whether of the tiny twin; None for what --tiny says.
  """
  gin_flags.parse()
  data_flags.use()
  arguments = gin_flags.bindings('train.train')
  return (
    twin.tiny(arguments, TINY_STEPS.value) if (_TINY.value if tiny is None else tiny) else arguments
  )
