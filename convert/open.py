"""Opens any checkpoint as a LanguageModel: a run, one of its checkpoints, a Hugging Face folder.

Our own checkpoints say themselves what they are, and their run directory holds the vocabulary;
Hugging Face folders, the OpenMoE port's or JetMoE's, bring config.json and a tokenizer. Nothing
that is read is run.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from convert import sizes
from convert.core.names import NamesError
from convert.core.source import find_form
from convert.core.tensors import ConvertError
from convert.formats.hf import HfForm
from convert.load import load_params
from openmoe import partitioning
from openmoe.checkpoint import safe_json
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import (
  Description,
  find_vocabulary,
  identity,
  identity_differences,
  undescribed,
)
from openmoe.checkpoint.paths import Unreadable, step_of
from openmoe.config import Architecture, ConfigError, ModelConfig
from openmoe.inference import chat
from openmoe.inference.model import LanguageModel
from openmoe.inference.placement import cast, expert_form, inference_mesh
from openmoe.inference.tokenizer import TextTokenizer, byte_tokenizer
from openmoe.models import abstract_params
from openmoe.models.decoding import unstack
from openmoe.types import PyTree

DTYPES = ('float32', 'bfloat16')
# What the published models were trained with; a run with longer rows has its own.
CONTEXT = {Architecture.OPENMOE: 2048, Architecture.JETMOE: 4096}


def load(
  checkpoint: str,
  *,
  dtype: str = 'float32',
  max_length: int | None = None,
  vocabulary: str | None = None,
  model: str | None = None,
  capacity: bool = False,
  num_model_partitions: int | None = None,
  num_expert_partitions: int = 1,
  batch_rows: int = 16,
) -> LanguageModel:
  """A model on all devices.

  Args:
    checkpoint: a run directory (its newest whole checkpoint is taken), RUN/checkpoint_STEP, or a
      Hugging Face folder.
    dtype: of activations and of the layers' kernels, 'float32' or 'bfloat16'.
    max_length: tokens of a sequence; None takes the longer of the training rows and the context of
      the published models (2048, JetMoE 4096).
    vocabulary: a SentencePiece model, for checkpoints that do not say theirs.
    model: a published size or a JSON file, for checkpoints of before there were descriptions.
    capacity: route as in training, with drops; see decode.inference_config.
    num_model_partitions, num_expert_partitions: see placement.inference_mesh.
    batch_rows: rows of a batch at most.

  Raises:
    ConfigError: there is no such checkpoint, its model or vocabulary is not known, or a value is
      wrong.
    CheckpointError: it is damaged.
  """
  if dtype not in DTYPES:
    raise ConfigError(f'dtype={dtype!r} is not one of {list(DTYPES)}; choose one of these.')
  if max_length is not None and max_length < 2:
    raise ConfigError(f'max_length={max_length} leaves no room for a token; give at least 2.')
  found = find(checkpoint, vocabulary, model)
  config = dataclasses.replace(found.config, dtype=dtype)
  mesh = inference_mesh(config, jax.devices(), num_model_partitions, num_expert_partitions)
  params = _placed(found.params(config, mesh), config, mesh, expert_form(config, mesh, capacity))
  return LanguageModel(
    config,
    params,
    found.vocabulary,
    start_id=found.start_id,
    max_length=max_length or max(found.row_length, CONTEXT[config.architecture]),
    name=found.name,
    mesh=mesh,
    capacity=capacity,
    batch_rows=batch_rows,
    unstacked=True,
    chat_template=found.chat_template,
    eos_ids=found.eos_ids,
  )


def provenance(checkpoint: str) -> dict[str, int | None]:
  """Step and tokens of training of a checkpoint of any form, as far as it tells them.

  Raises:
    ConfigError: it cannot be read.
  """
  form = _as_config_error(lambda: find_form(checkpoint))
  told = getattr(form, 'description', None)
  return {'step': form.step, 'tokens_seen': told.tokens_seen if told else None}


@dataclasses.dataclass(frozen=True)
class Found:
  """A checkpoint whose parameters are not read yet.

  Attributes:
    params: (config, mesh) -> scanned tree of host or device arrays.
  """

  name: str
  config: ModelConfig
  vocabulary: Any
  params: Any
  start_id: int = 0
  row_length: int = 0
  chat_template: chat.ChatTemplate = chat.OPENMOE
  eos_ids: tuple[int, ...] = ()


def find(checkpoint: str, vocabulary: str | None = None, model: str | None = None) -> Found:
  """Opens a checkpoint; the arguments are load()'s.

  Raises:
    ConfigError: there is none, or its model or vocabulary is not known.
  """
  path = epath.Path(checkpoint)
  if not path.exists():
    raise ConfigError(
      f'{checkpoint} does not exist. Give a run directory, RUN/checkpoint_STEP, or a Hugging Face '
      f'folder; `bash scripts/run_pretrain.sh` makes runs/openmoe_tiny.'
    )
  is_hf = (path / 'config.json').exists()
  return _open_hf(path, vocabulary) if is_hf else _open_run(path, vocabulary, model)


def _shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> PyTree:
  _, axes = abstract_params(config)
  is_axes = lambda a: isinstance(a, tuple)
  one = lambda a: NamedSharding(mesh, partitioning.logical_to_spec(a))
  return jax.tree.map(one, axes, is_leaf=is_axes)


def _placed(
  params: PyTree, config: ModelConfig, mesh: jax.sharding.Mesh | None, form: Callable | None
) -> PyTree:
  """Puts one array after the other on the devices, split by layer, in the dtype of its use.

  The whole model is never there twice.
  """
  stacked = flax.traverse_util.flatten_dict(params, sep='/')
  params.clear()
  shardings = {}
  if mesh is not None:
    shardings = flax.traverse_util.flatten_dict(_shardings(config, mesh), sep='/')
  flat: dict[str, jax.Array] = {}
  for path in list(stacked):
    array = stacked.pop(path)
    if not isinstance(array, jax.Array):
      array = jax.device_put(np.asarray(array, np.float32), shardings.get(path))
    tree = flax.traverse_util.unflatten_dict({path: array}, sep='/')
    tree = cast(unstack(tree, config, form), config)
    flat |= flax.traverse_util.flatten_dict(tree, sep='/')
  return flax.traverse_util.unflatten_dict(flat, sep='/')


# --- our own checkpoints


def _open_run(path: epath.Path, vocabulary: str | None, model: str | None) -> Found:
  named = step_of(path)
  run = path if named is None else path.parent
  reader = Checkpointer(run, 1, None, read_only=True)
  try:
    step = reader.latest_step() if named is None else named
    if step is None:
      raise ConfigError(
        f'{path} is no run directory with whole checkpoints, no checkpoint_STEP and no Hugging '
        'Face folder.'
      )
    told = reader.describe(step)
    if told is None:
      told = Description(_named(run / f'checkpoint_{step}', model, reader.identity(step)))
  finally:
    reader.close()
  config = told.model
  if not vocabulary and told.vocabulary is None:
    raise ConfigError(
      f'{run}/checkpoint_{step} does not say its vocabulary: give the SentencePiece model, '
      'vocabulary=PATH (--vocabulary=PATH).'
    )

  def params(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> PyTree:
    shapes, _ = abstract_params(config)
    if mesh is not None:
      place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
      shapes = jax.tree.map(place, shapes, _shardings(config, mesh))
    reader = Checkpointer(run, 1, None, read_only=True)
    try:
      return dict(reader.restore_params(step, shapes))
    finally:
      reader.close()

  jetmoe = config.architecture is Architecture.JETMOE
  return Found(
    f'{config.name}:{step}',
    config,
    TextTokenizer.open(vocabulary) if vocabulary else described_vocabulary(run, told),
    params,
    start_id=told.start_id,
    row_length=told.row_length or 0,
    chat_template=chat.JETMOE if jetmoe else chat.OPENMOE,
    eos_ids=told.eos_ids,
  )


def described_vocabulary(
  run: epath.Path, told: Description, added: Mapping[str, int] | None = None
) -> TextTokenizer:
  """The tokenizer that a description names, from the copy in the run directory if there is one."""
  record = told.vocabulary
  if record.kind == 'bytes':
    return byte_tokenizer(record.extra_ids, told.eos_ids[0])
  content = find_vocabulary(run, record)
  return TextTokenizer.of(record.kind, content, str(run), told.eos_ids[0], record.extra_ids, added)


def _named(path: epath.Path, model: str | None, told: Mapping[str, Any]) -> ModelConfig:
  """The model of a checkpoint of before there were descriptions, as the user says."""
  if model is None:
    raise ConfigError(undescribed(path, told))
  config = _as_config_error(lambda: sizes.named(model))
  if differences := identity_differences(told, identity(config)):
    raise ConfigError(f'{path} is of another model than {model}: {"; ".join(differences)}.')
  return config


def _as_config_error(read: Callable[[], Any]) -> Any:
  try:
    return read()
  except ConvertError as error:
    raise ConfigError(str(error)) from error


# --- Hugging Face folders


def _open_hf(path: epath.Path, vocabulary: str | None) -> Found:
  try:
    form = HfForm(path)
  except ConvertError as error:
    raise ConfigError(f'{path} cannot be read: {error}') from error
  facts = form.config
  jetmoe = facts.get('model_type') == 'jetmoe'
  name = os.path.basename(os.path.abspath(path))
  config = _as_config_error(lambda: sizes.of_form(form, None))
  # JetMoeConfig leaves out its defaults; the OpenMoE port writes its own, 0 and 1.
  start, eos = (1, (2,)) if jetmoe else (0, (1,))
  if jetmoe:
    start = _token(path, facts, 'bos_token_id', config, start)
  eos_ids = _eos_ids(path, facts, config, eos) if jetmoe or 'openmoe_step' in facts else eos
  return Found(
    name,
    dataclasses.replace(config, name=name),
    TextTokenizer.open(vocabulary or str(path), eos_ids[0]),
    lambda config, mesh: _read(form, config),
    start_id=start,
    row_length=_count(facts, 'max_position_embeddings') or _count(facts, 'n_positions'),
    chat_template=chat.from_folder(pathlib.Path(path)) or (chat.JETMOE if jetmoe else chat.OPENMOE),
    eos_ids=eos_ids,
  )


def _count(facts: Mapping[str, Any], name: str) -> int:
  value = facts.get(name) or 0
  if isinstance(value, bool) or not isinstance(value, int) or value < 0:
    raise ConfigError(f'config.json: {name}={value!r} must be a whole number; repair it.')
  return value


def _token(path, facts: Mapping[str, Any], name: str, config: ModelConfig, default: int) -> int:
  """A token id of a folder's file of facts."""
  value = facts.get(name)
  if value is None:
    return default
  if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < config.vocab_size:
    raise ConfigError(
      f'{path}: {name}={value!r} must be a token below vocab_size={config.vocab_size}; repair it.'
    )
  return value


def _eos_ids(path, facts: Mapping[str, Any], config: ModelConfig, default) -> tuple[int, ...]:
  """Tokens that end a text: those of config.json first, then those of generation_config.json."""
  other = path / 'generation_config.json'
  try:
    more = safe_json.read(other) if other.exists() else {}
  except (OSError, Unreadable) as error:
    raise ConfigError(f'{other} cannot be read: {error}') from error
  found: dict[int, None] = {}
  for told in (facts, more):
    value = told.get('eos_token_id')
    for one in value if isinstance(value, list) else [value]:
      if one is not None:
        found[_token(path, {'eos_token_id': one}, 'eos_token_id', config, 0)] = None
  return tuple(found) or default


def _read(form: HfForm, config: ModelConfig) -> PyTree:
  try:
    return load_params(form, config)
  except (ConvertError, NamesError) as error:
    raise ConfigError(f'{error} `python -m convert fsck {form.path}` lists all.') from error
