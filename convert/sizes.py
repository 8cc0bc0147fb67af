"""--model: which model a checkpoint is of, read without running anything.

A size is a file of gin/models (read for its literal values; gin is not involved), a JSON file with
the fields of ModelConfig, or what the checkpoint itself tells.
"""

from __future__ import annotations

import ast
import difflib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from convert.core.forms import Form, reading
from convert.core.tensors import ConvertError
from openmoe.config import Architecture, ConfigError, ModelConfig, MoEConfig

MODELS = pathlib.Path(__file__).resolve().parent.parent / 'gin' / 'models'
# How JetMoE differs from the defaults of ModelConfig and MoEConfig, in all its sizes.
_JETMOE = {'architecture': Architecture.JETMOE.value, 'final_norm_epsilon': 1e-5}
_JETMOE_MOE = {
  'dispatch': 'dropless',
  'router_order': 'top_k_softmax',
  'router_loss': 'sum',
  'router_init_std': 0.01,
  'ignore_padding': True,
  'router_z_weight': 0.001,
}
_SIZES = ('vocab_size', 'num_layers', 'embed_dim', 'mlp_dim', 'num_heads', 'head_dim')


def _read_gin(path: pathlib.Path) -> dict[str, Any]:
  """Literal bindings of ModelConfig and MoEConfig; macros and references are left out."""
  fields: dict[str, Any] = {}
  section = None
  for line in path.read_text(encoding='utf-8').splitlines():
    if head := re.fullmatch(r'config\.(\w+):\s*', line):
      section = head[1]
    elif item := re.fullmatch(r'  (\w+) = ([^%@].*?)(\s+#.*)?', line):
      target = fields if section == 'ModelConfig' else fields.setdefault('moe', {})
      if section in ('ModelConfig', 'MoEConfig'):
        target[item[1]] = ast.literal_eval(item[2])
    elif line and not line.startswith(' '):
      section = None
  return fields


def config_from(fields: Mapping[str, Any], where: str) -> ModelConfig:
  """ModelConfig from plain values, `moe` being a mapping.

  Raises:
    ConvertError: a field is unknown, missing or breaks a rule of ModelConfig.
  """
  fields = dict(fields)
  moe = fields.pop('moe', None)
  try:
    return ModelConfig(**fields, moe=MoEConfig(**moe) if moe else None)
  except (TypeError, ConfigError) as error:
    raise ConvertError(f'{where} does not describe a model: {error}') from error


def named(model: str) -> ModelConfig:
  """The model that --model names.

  Raises:
    ConvertError: there is no such size or file, with the nearest names.
  """
  path = pathlib.Path(model)
  if path.suffix == '.json':
    if not path.is_file():
      raise ConvertError(f'--model={model} does not exist.')
    return config_from(json.loads(path.read_text(encoding='utf-8')), model)
  gin_file = path if path.suffix == '.gin' else MODELS / f'{model}.gin'
  if not gin_file.is_file():
    known = sorted(p.stem for p in MODELS.glob('*.gin'))
    near = difflib.get_close_matches(model, known, n=2) or known
    raise ConvertError(
      f'--model={model} is not a size of gin/models. Nearest: {near}. Or give a JSON file with the '
      'fields of openmoe.config.ModelConfig.'
    )
  return config_from(_read_gin(gin_file), str(gin_file))


def _known() -> list[ModelConfig]:
  return [named(path.stem) for path in sorted(MODELS.glob('*.gin'))]


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
  told = {k: v for k, v in form.sizes().items() if v is not None}
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
  told = _told(form)
  if model is not None:
    config = named(model)
    mine = _identity(config)
    wrong = [
      f'{name} is {told[name]} there and {mine[name]} in --model={model}'
      for name in mine
      if name in told and told[name] != mine[name]
    ]
    if wrong:
      raise ConvertError(f'{form.path} is of another model: {"; ".join(wrong)}.')
    return config
  for config in _known():
    mine = _identity(config)
    if all(told.get(name, value) == value for name, value in mine.items()):
      return config
  return of_told(told, str(form.path))


def of_told(told: Mapping[str, Any], where: str) -> ModelConfig:
  """The model of what Form.sizes() told; what it does not tell is as published.

  Raises:
    ConvertError: a size is missing.
  """
  missing = [name for name in (*_SIZES, 'num_sparse_layers') if name not in told]
  if missing:
    raise ConvertError(
      f'{where} does not tell {", ".join(missing)}; give --model (a name of gin/models, or a '
      'JSON file with the fields of ModelConfig).'
    )
  fields = {name: told[name] for name in (*_SIZES, 'num_sparse_layers')}
  fields['name'] = told.get('name') or 'converted'
  jetmoe = told.get('architecture') == Architecture.JETMOE.value
  if fields['num_sparse_layers']:
    moe = _JETMOE_MOE if jetmoe else {}
    fields['moe'] = moe | {'num_experts': told['num_experts']} | told.get('moe', {})
  return config_from((_JETMOE if jetmoe else {}) | fields | told.get('model', {}), where)
