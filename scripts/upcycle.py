"""Makes a mixture of experts from a dense checkpoint: python -m scripts.upcycle

  python -m scripts.upcycle --gin_file=gin/models/openmoe_tiny.gin \\
    --dense_checkpoint=runs/dense/checkpoint_400 --output=runs/upcycled [--dense_name=NAME]

The gin file is of the model that comes out; convert/upcycle.py says which dense model it needs and
why the result computes the same. The largest difference of the logits is printed, and more than
1e-5 is an error. Train on from the result:

  bash scripts/run_pretrain.sh --gin.INITIAL_CHECKPOINT="'runs/upcycled/checkpoint_0'" \\
    --gin.INITIAL_STATE="'params'"
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

from scripts import quiet

quiet.import_tensorflow()

import gin
import jax
import jax.numpy as jnp
from absl import flags

from convert.upcycle import dense_config, described_as, logit_difference, upcycle
from openmoe.checkpoint import description
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.checkpoint.paths import step_of
from openmoe.config import ConfigError, ModelConfig
from openmoe.models import abstract_params
from openmoe.train_step import TrainState
from scripts import gin_flags

_DENSE = flags.DEFINE_string('dense_checkpoint', None, 'RUN/checkpoint_STEP.', required=True)
_NAME = flags.DEFINE_string('dense_name', None, 'Its model name, if not that of the gin file.')
_OUTPUT = flags.DEFINE_string('output', None, 'Run directory to be made.', required=True)
_SEED = flags.DEFINE_integer('seed', 0, 'Of routers and noise.')
_NOISE = flags.DEFINE_float('noise', 0.0, "Share of a copied kernel's standard deviation.")

LIMIT = 1e-5


def run() -> float:
  """Reads, upcycles, checks and writes; returns the difference of the logits."""
  gin_flags.parse()
  config = gin.get_configurable(ModelConfig)()
  dense = dense_config(config, _NAME.value)
  directory, _, name = _DENSE.value.rstrip('/').rpartition('/')
  step = step_of(name)
  if step is None:
    raise ConfigError(f'--dense_checkpoint={_DENSE.value} must end in checkpoint_STEP.')
  source = Checkpointer(directory or '.', 1, identity(dense), read_only=True)
  dense_params = source.restore_params(step, abstract_params(dense)[0])
  told = source.describe(step)
  described = described_as(told, config, dense, _DENSE.value)
  source.close()
  params = jax.tree.map(jnp.asarray, upcycle(dense_params, config, _SEED.value, _NOISE.value))
  difference = logit_difference(dense_params, params, config)
  if difference > LIMIT and not _NOISE.value:
    raise ConfigError(f'The logits differ by {difference:.2e}, more than {LIMIT:g}; not written.')
  target = Checkpointer(_OUTPUT.value, 1, identity(config))
  if (there := target.latest_step()) is not None:
    raise ConfigError(f'--output={_OUTPUT.value} has a checkpoint_{there}; give another place.')
  state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=())
  about = {'upcycled_from': _DENSE.value, 'noise': _NOISE.value}
  target.save(0, state, {}, about | {description.KEY: described.plain()})
  target.close()
  if told and told.vocabulary and told.vocabulary.kind != 'bytes':
    content = description.find_vocabulary(directory or '.', told.vocabulary)
    description.keep_vocabulary(_OUTPUT.value, told.vocabulary, content)
  return difference


@command.guarded
def main() -> None:
  difference = run()
  print(f'{_OUTPUT.value}/checkpoint_0: largest difference of the logits {difference:.2e}')


if __name__ == '__main__':
  gin_flags.run(main)
