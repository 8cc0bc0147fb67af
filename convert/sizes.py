"""Which model a checkpoint is of: what it says of itself, or --model where it says too little.

A size of --model is a name of openmoe.models.sizes or a JSON file with the fields of ModelConfig.
Nothing is run to find out.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Mapping
from typing import Any

from convert.core.forms import Form, reading
from convert.core.tensors import ConvertError
from openmoe.checkpoint import description, fields, safe_json
from openmoe.checkpoint.paths import Unreadable
from openmoe.config import Architecture, ConfigError, ModelConfig
from openmoe.models.sizes import SIZES, jetmoe_routing

# How JetMoE differs from the defaults of ModelConfig and MoEConfig, in all its sizes.
_JETMOE = {'architecture': Architecture.JETMOE.value, 'final_norm_epsilon': 1e-5}
_SIZES = ('vocab_size', 'num_layers', 'embed_dim', 'mlp_dim', 'num_heads', 'head_dim')


def config_from(told: Mapping[str, Any], where: str) -> ModelConfig:
  """ModelConfig from plain values, `moe` being a mapping.

  Raises:
    ConvertError: a field is unknown, missing or breaks a rule of ModelConfig.
  """
  try:
    return fields.read(ModelConfig, told, where)
  except ConfigError as error:
    raise ConvertError(str(error)) from error


def named(model: str) -> ModelConfig:
  """The model that --model names.

  Raises:
    ConvertError: there is no such size or file, with the nearest names.
  """
  if model.endswith('.json'):
    if not pathlib.Path(model).is_file():
      raise ConvertError(f'--model={model} does not exist.')
    try:
      return config_from(safe_json.read(model), model)
    except (OSError, Unreadable) as error:
      raise ConvertError(f'--model={model} cannot be read: {error}') from error
  if model not in SIZES:
    near = difflib.get_close_matches(model, SIZES, n=2) or sorted(SIZES)
    raise ConvertError(
      f'--model={model} is not a published size. Nearest: {near}. Or give a JSON file with the '
      'fields of openmoe.config.ModelConfig.'
    )
  return SIZES[model]


def _identity(config: ModelConfig) -> dict[str, Any]:
  """What must agree for two configurations to be one model: shapes, and what is computed."""
  sizes = {name: getattr(config, name) for name in (*_SIZES, 'num_sparse_layers', 'rope_theta')}
  return sizes | {
    'num_experts': config.moe.num_experts if config.moe else 0,
    'top_k': config.moe.top_k if config.moe else 0,
    'architecture': config.architecture.value,
    'final_norm_epsilon': config.final_norm_epsilon or config.norm_epsilon,
  }


def _told(form: Form) -> dict[str, Any]:
  """What a checkpoint tells of itself, all in one mapping beside `moe` and `model`."""
  told = {k: v for k, v in form.told().items() if v is not None}
  computed = told.get('model', {}) | told.get('moe', {})
  names = ('rope_theta', 'final_norm_epsilon', 'top_k')
  return told | {k: computed[k] for k in names if computed.get(k) is not None}


def of_form(form: Form, model: str | None) -> ModelConfig:
  """The model of a checkpoint: as --model says, checked against what the checkpoint tells.

  Args:
    model: --model, None to take all from the checkpoint.

  Raises:
    ConvertError: the two disagree, or the checkpoint alone does not tell enough.
  """
  with reading(form.path):
    return _of_form(form, model)


def _of_form(form: Form, model: str | None) -> ModelConfig:
  told = form.model()
  if model is None:
    return told or of_told(form.sizes(), str(form.path), form.base())
  config = named(model)
  found, mine = (_identity(told) if told else _told(form)), _identity(config)
  wrong = [
    f'{name} is {found[name]} there and {mine[name]} in --model={model}'
    for name in mine
    if name in found and found[name] != mine[name]
  ]
  if wrong:
    raise ConvertError(f'{form.path} is of another model: {"; ".join(wrong)}.')
  return told or config


def of_told(told: Mapping[str, Any], where: str, base: ModelConfig | None = None) -> ModelConfig:
  """The model of what Form.sizes() told; what it does not tell is as in `base`, or as published.

  Raises:
    ConvertError: a size is missing.
  """
  told = {name: value for name, value in told.items() if value is not None}
  missing = [name for name in (*_SIZES, 'num_sparse_layers') if name not in told]
  if missing:
    raise ConvertError(
      f'{where} does not tell {", ".join(missing)}; give --model (a published size, or a JSON file '
      'with the fields of ModelConfig).'
    )
  found = {name: told[name] for name in (*_SIZES, 'num_sparse_layers')}
  found['name'] = told.get('name') or 'converted'
  jetmoe = told.get('architecture') == Architecture.JETMOE.value
  if base is not None:
    known = description.model_fields(base)
    moe = known.pop('moe') or {}
  else:
    known = _JETMOE if jetmoe else {}
    moe = fields.plain(jetmoe_routing(told['num_experts'])) if jetmoe else {}
  if found['num_sparse_layers']:
    found['moe'] = moe | {'num_experts': told['num_experts']} | told.get('moe', {})
  return config_from(known | found | told.get('model', {}), where)
