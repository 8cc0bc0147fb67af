"""Opens any checkpoint as a LanguageModel: a run, one of its checkpoints, a Hugging Face folder.

Our own checkpoints say themselves what they are, and their run directory holds the vocabulary;
Hugging Face folders, the OpenMoE port's or JetMoE's, bring config.json and a tokenizer. Nothing
that is read is run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from convert import outside, sizes
from convert.core.names import NamesError
from convert.core.source import find_form
from convert.core.tensors import ConvertError
from convert.formats.hf import HfForm
from convert.load import load_params
from openmoe import partitioning
from openmoe.checkpoint.checkpointer import Checkpointer
from openmoe.checkpoint.description import (
  Description,
  check_vocabulary,
  find_vocabulary,
  identity,
  identity_differences,
  undescribed,
)
from openmoe.checkpoint.paths import step_of
from openmoe.config import Architecture, ConfigError, ModelConfig
from openmoe.inference import chat
from openmoe.inference.int8 import check_weights, quantised
from openmoe.inference.model import LanguageModel
from openmoe.inference.placement import cast, expert_form, inference_mesh
from openmoe.inference.routing import routed
from openmoe.inference.tokenizer import TextTokenizer, byte_tokenizer, read_tokenizer
from openmoe.models import abstract_params
from openmoe.models.decoding import is_expert_kernel, unstack
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
  devices: Sequence[jax.Device] | None = None,
  routing: str = '',
  weights: str = 'float',
  offload: str = 'none',
  expert_budget: int | None = None,
  offload_dir: str | None = None,
) -> LanguageModel:
  """A model on all devices, or on those given.

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
    devices: to use; None for all there are.
    routing: what is done to the decisions of routers; see openmoe.inference.routing.
    weights: how kernels are held; see openmoe.inference.int8.WEIGHTS.
    offload: where experts lie, 'none' for the device, 'ram' for the host, or 'disk' for a file.
    expert_budget: bytes of experts in memory with offload='disk'; None for a quarter of them.
    offload_dir: of that file, which is removed at the end; None for the system's temporary folder.

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
  told = found.told
  config = dataclasses.replace(told.model, dtype=dtype)
  mesh = inference_mesh(
    config, devices or jax.devices(), num_model_partitions, num_expert_partitions
  )
  check_weights(weights, mesh)
  outside.check(offload, weights, expert_budget, alone=mesh is None and not capacity)
  store = None
  if offload == 'none':
    read = found.params(config, mesh)
  else:
    where = (config, offload, expert_budget, offload_dir)
    read, store = _as_config_error(lambda: outside.read(checkpoint, *where))
  form = expert_form(config, mesh, capacity, weights, store)
  params = _placed(read, config, mesh, form, weights, offloads=store is not None)
  model = LanguageModel(
    config,
    params,
    found.vocabulary,
    start_id=told.start_id,
    max_length=max_length or max(told.row_length or 0, CONTEXT[config.architecture]),
    name=found.name,
    mesh=mesh,
    capacity=capacity,
    batch_rows=batch_rows,
    unstacked=True,
    chat_template=found.chat_template,
    eos_ids=told.eos_ids,
    step=found.step,
    weights=weights,
  )
  return routed(model, routing)


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
    told: what it says of itself.
    params: (config, mesh) -> scanned tree of host or device arrays.
    step: of the checkpoint of a run.
  """

  name: str
  told: Description
  vocabulary: TextTokenizer
  params: Callable[[ModelConfig, jax.sharding.Mesh | None], PyTree]
  step: int | None = None

  @property
  def chat_template(self) -> chat.ChatTemplate:
    if self.told.chat:
      return chat.of_record(self.told.chat)
    return chat.JETMOE if self.told.model.architecture is Architecture.JETMOE else chat.OPENMOE


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
  params: PyTree,
  config: ModelConfig,
  mesh: jax.sharding.Mesh | None,
  form: Callable | None,
  weights: str = 'float',
  offloads: bool = False,
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
    stays = offloads and is_expert_kernel(path, config)
    if not (isinstance(array, jax.Array) or stays):
      array = jax.device_put(np.asarray(array, np.float32), shardings.get(path))
    tree = flax.traverse_util.unflatten_dict({path: array}, sep='/')
    tree = cast(quantised(unstack(tree, config, form), config, weights), config)
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
    described = told is not None
    if not described:
      told = Description(_named(run / f'checkpoint_{step}', model, reader.identity(step)))
  finally:
    reader.close()
  config = told.model
  if not vocabulary and told.vocabulary is None:
    raise ConfigError(
      f'{run}/checkpoint_{step} does not say its vocabulary: give the SentencePiece model, '
      'vocabulary=PATH (--vocabulary=PATH).'
    )
  if described:
    tokenizer = described_tokenizer(run, told, vocabulary)
  else:  # then only the vocabulary knows what ends a text
    tokenizer = TextTokenizer.open(vocabulary)
    told = dataclasses.replace(told, eos_ids=(tokenizer.eos_id,))

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

  return Found(f'{config.name}:{step}', told, tokenizer, params, step)


def described_tokenizer(run: epath.Path, told: Description, given: str | None) -> TextTokenizer:
  """The tokenizer that a description names, from the user's file or the run directory's.

  Raises:
    ConfigError: the user's is another one, or there is none.
  """
  record = told.vocabulary
  if record is None:
    return TextTokenizer.open(given, told.eos_ids[0])
  if given:
    kind, file, content = read_tokenizer(given)
    check_vocabulary(kind, content, record, str(file), 'leave it out, or give the described one')
    where = str(file)
  elif record.kind == 'bytes':
    return byte_tokenizer(record.extra_ids, told.eos_ids[0])
  else:
    content, where = find_vocabulary(run, record), str(run)
  added = {token.piece_text: token.id for token in record.added}
  return TextTokenizer.of(
    record.kind, content, where, told.eos_ids[0], record.extra_ids, added=added
  )


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
  name = os.path.basename(os.path.abspath(path))
  config = _as_config_error(lambda: sizes.of_form(form, None))
  told = _as_config_error(lambda: form.describe(dataclasses.replace(config, name=name)))
  tokenizer = TextTokenizer.open(vocabulary or str(path), told.eos_ids[0])
  return Found(name, told, tokenizer, lambda config, mesh: _read(form, config))


def _read(form: HfForm, config: ModelConfig) -> PyTree:
  try:
    return load_params(form, config)
  except (ConvertError, NamesError) as error:
    raise ConfigError(f'{error} `python -m convert fsck {form.path}` lists all.') from error
