"""What a run starts from: a checkpoint of t5x's or Hugging Face's form is imported first."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile

import jax
from etils import epath

from convert.core.tensors import ConvertError
from convert.run import Options, convert, find_form
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import model_fields
from openmoe.config import ConfigError, InitialState, ModelConfig, TrainConfig

IMPORTED = 'imported'  # folder of the run directory


def with_own_checkpoint(run: TrainConfig, model: ModelConfig) -> TrainConfig:
  """The run, with run.initial_checkpoint in our form.

  What t5x or transformers wrote is imported into MODEL_DIR/imported, with a receipt; the same run
  started again finds it there. A run that has checkpoints of its own goes on from these, and
  nothing is looked at.

  Raises:
    ConfigError: there are several processes, of which none may import for all; or INITIAL_STATE is
      'all' and the checkpoint has no optimizer state.
    ConvertError: the checkpoint is damaged or of another model.
  """
  if run.initial_checkpoint is None or _has_checkpoint(run.model_dir):
    return run
  path = epath.Path(run.initial_checkpoint)
  if (path / 'metadata').exists() or not path.exists():
    return run  # ours, or nothing, about which the run itself says more
  form = find_form(path)
  if form.kind == 'ours':
    return run
  wants_all = run.initial_state is InitialState.ALL
  if wants_all and not form.has_optimizer:
    raise ConfigError(
      f'initial_checkpoint={run.initial_checkpoint} ({form.kind}) has no optimizer state to go on '
      "with: set INITIAL_STATE = 'params'."
    )
  if jax.process_count() > 1:
    optimizer = ' --optimizer' if wants_all else ''
    raise ConfigError(
      f'initial_checkpoint={run.initial_checkpoint} is of another form ({form.kind}), and of '
      f'several processes none may import it for all. Run first: python -m convert import --from '
      f'{form.kind}{optimizer} --model {model.name} {run.initial_checkpoint} IMPORTED'
    )
  options = Options(optimizer=wants_all, logits=False)
  with tempfile.TemporaryDirectory() as folder:
    told = pathlib.Path(folder) / 'model.json'
    told.write_text(json.dumps(model_fields(model)), encoding='utf-8')
    try:
      result = convert(form, 'ours', epath.Path(run.model_dir) / IMPORTED, str(told), options)
    except ConvertError as error:
      raise ConfigError(f'initial_checkpoint={run.initial_checkpoint}: {error}') from error
  return dataclasses.replace(run, initial_checkpoint=str(result.path))


def _has_checkpoint(model_dir: str) -> bool:
  if not epath.Path(model_dir).exists():
    return False
  reader = Checkpointer(model_dir, 1, None, read_only=True)
  try:
    return reader.latest_step() is not None
  finally:
    reader.close()
