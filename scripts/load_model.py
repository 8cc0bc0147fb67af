"""Opens any checkpoint as a LanguageModel: a run, one of its checkpoints, a Hugging Face folder.

A run directory says in its config.gin what the model is and which vocabulary it was trained with;
converted checkpoints have none, so a vocabulary must be given. Hugging Face folders, the OpenMoE
port's or JetMoE's, bring their tokenizer along.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import gin
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
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import identity
from openmoe.config import Architecture, ConfigError, ModelConfig
from openmoe.inference import chat
from openmoe.inference.model import LanguageModel
from openmoe.inference.placement import cast, expert_form, inference_mesh
from openmoe.models import unstack
from openmoe.observe.record import CONFIG
from openmoe.programme import Programme
from openmoe.train_state import abstract_params
from openmoe.types import PyTree
from scripts import gin_flags
from scripts.tokenizers import TextTokenizer

DTYPES = ('float32', 'bfloat16')
# What the published models were trained with; a run with longer rows has its own.
CONTEXT = {Architecture.OPENMOE: 2048, Architecture.JETMOE: 4096}


def load(
  checkpoint: str,
  *,
  dtype: str = 'float32',
  max_length: int | None = None,
  vocabulary: str | None = None,
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
  path = epath.Path(checkpoint)
  if not path.exists():
    raise ConfigError(
      f'{checkpoint} does not exist. Give a run directory, RUN/checkpoint_STEP, or a Hugging Face '
      f'folder; `bash scripts/run_pretrain.sh` makes runs/openmoe_tiny.'
    )
  is_hf = (path / 'config.json').exists()
  found = _open_hf(path, vocabulary) if is_hf else _open_run(path, vocabulary)
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
  )


@dataclasses.dataclass(frozen=True)
class _Found:
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


def _open_run(path: epath.Path, vocabulary: str | None) -> _Found:
  named = re.fullmatch(r'checkpoint_(\d+)', path.name)
  run = path.parent if named else path
  try:
    form = find_form(path, 'ours')
  except ConvertError as error:
    raise ConfigError(
      f'{path} is no run directory with checkpoints, no checkpoint_STEP and no Hugging Face folder '
      f'({error}).'
    ) from error
  if (run / CONFIG).exists():
    config, own_vocabulary, row_length = _read_run(run / CONFIG, with_vocabulary=not vocabulary)
  else:
    config, own_vocabulary, row_length = _sizes_of(form), None, 0
  if not vocabulary and own_vocabulary is None:
    raise ConfigError(
      f'{run} has no {CONFIG} that names a vocabulary: give the SentencePiece model, '
      'vocabulary=PATH (--vocabulary=PATH).'
    )

  def params(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> PyTree:
    shapes, _ = abstract_params(config)
    if mesh is not None:
      place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
      shapes = jax.tree.map(place, shapes, _shardings(config, mesh))
    reader = Checkpointer(run, 1, identity(config), read_only=True)
    try:
      step = int(named[1]) if named else reader.latest_step()
      return dict(reader.restore_params(step, shapes))
    finally:
      reader.close()

  jetmoe = config.architecture is Architecture.JETMOE
  return _Found(
    f'{config.name}:{form.step}',
    config,
    TextTokenizer.open(vocabulary) if vocabulary else own_vocabulary,
    params,
    row_length=row_length,
    chat_template=chat.JETMOE if jetmoe else chat.OPENMOE,
  )


def _read_run(path: epath.Path, with_vocabulary: bool) -> tuple[ModelConfig, Any, int]:
  """(model, vocabulary or None, tokens of a row) from what a run wrote down."""
  before = gin.config_str()
  with gin.unlock_config():
    gin.clear_config()
    try:
      gin.parse_config(path.read_text(encoding='utf-8'))
      arguments = gin_flags.bindings('train.train')
    except (ValueError, ImportError, AttributeError, SyntaxError) as error:
      raise ConfigError(f'{path} cannot be read: {gin_flags.explain(error)}') from error
    finally:
      gin.clear_config()
      gin.parse_config(before)
  data = arguments['data']
  if isinstance(data, Programme):
    data = data.stages[-1].data
  if not with_vocabulary:
    return arguments['model'], None, data.row_length
  import seqio

  for source in arguments.get('sources', ()):
    source.register()
  task = seqio.get_mixture_or_task(data.mixture_or_task_name)
  return arguments['model'], task.output_features['targets'].vocabulary, data.row_length


def _sizes_of(form) -> ModelConfig:
  try:
    return sizes.of_form(form, None)
  except ConvertError as error:
    raise ConfigError(f'The model of {form.path} is not known: {error}') from error


# --- Hugging Face folders


def _open_hf(path: epath.Path, vocabulary: str | None) -> _Found:
  try:
    form = HfForm(path)
  except ConvertError as error:
    raise ConfigError(f'{path} cannot be read: {error}') from error
  facts = form.config
  jetmoe = facts.get('model_type') == 'jetmoe'
  name = os.path.basename(os.path.abspath(path))
  config = dataclasses.replace(_sizes_of(form), name=name)
  # JetMoeConfig leaves out its defaults; the OpenMoE port writes its own, 0 and 1.
  start, eos = (facts.get(key) for key in ('bos_token_id', 'eos_token_id'))
  start, eos = (1 if start is None else start, 2 if eos is None else eos) if jetmoe else (0, 1)
  return _Found(
    name,
    config,
    TextTokenizer.open(vocabulary or str(path), eos if isinstance(eos, int) else eos[0]),
    lambda config, mesh: _read(form, config),
    start_id=start,
    row_length=facts.get('max_position_embeddings') or facts.get('n_positions') or 0,
    chat_template=chat.from_folder(pathlib.Path(path)) or (chat.JETMOE if jetmoe else chat.OPENMOE),
  )


def _read(form: HfForm, config: ModelConfig) -> PyTree:
  try:
    return load_params(form, config)
  except (ConvertError, NamesError) as error:
    raise ConfigError(f'{error} `python -m convert fsck {form.path}` lists all.') from error
