"""config.json of JetMoE as transformers has it, and as the first release had it.

Weights load with transformers' own classes, so no code goes beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from convert.core.tensors import ConvertError
from convert.formats.hf_fields import count, number, of_class, refuse
from openmoe.checkpoint.fields import shown
from openmoe.config import Architecture, ModelConfig, MoEConfig, RouterOrder

MODEL_TYPE = 'jetmoe'
MAX_POSITIONS = 4096
# Ours -> the name of transformers, that of the first release, and the default of both.
_SIZES = {
  'vocab_size': ('vocab_size', 'vocab_size', 32000),
  'num_layers': ('num_hidden_layers', 'num_hidden_layers', 12),
  'embed_dim': ('hidden_size', 'hidden_size', 2048),
  'mlp_dim': ('intermediate_size', 'ffn_hidden_size', 5632),
  'num_heads': ('num_key_value_heads', 'num_key_value_heads', 16),
  'head_dim': ('kv_channels', 'kv_channels', 128),
  'num_experts': ('num_local_experts', 'moe_num_experts', 8),
}
_MOE = {
  'top_k': ('num_experts_per_tok', 'moe_top_k', 2),
  'load_balance_weight': ('aux_loss_coef', 'aux_loss_coef', 0.01),
}
_MODEL = {
  'init_std': ('initializer_range', 'initializer_range', 0.01),
  'final_norm_epsilon': ('rms_norm_eps', 'layer_norm_epsilon', 1e-6),
}
# What the computation here cannot do otherwise: field -> the only value.
_FIXED = {
  'activation_function': 'silu',
  'tie_word_embeddings': True,
  'bias': True,
  'glu': True,
  'rotary_percent': 1.0,
}


def is_jetmoe(config: Mapping[str, Any]) -> bool:
  return config.get('model_type') == MODEL_TYPE


def _named(
  config: Mapping[str, Any], names: Mapping[str, tuple[str, str, Any]]
) -> Iterator[tuple[str, str]]:
  """(name in this config.json, ours) of the fields that it has."""
  for ours, (name, older, _) in names.items():
    yield (name if name in config else older), ours


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
  """Sizes of the model as convert.sizes.of_form takes them.

  Raises:
    ConvertError: a field that changes the computation has another value than the published model.
  """
  for name, only in _FIXED.items():
    if config.get(name, only) != only:
      raise ConvertError(
        f'config.json has {name}={shown(config[name])}; only {only!r} is implemented, as published.'
      )
  rope = config.get('rope_parameters') or {}
  if not isinstance(rope, Mapping):
    raise refuse('rope_parameters', rope, 'an object')
  if (kind := rope.get('rope_type', 'default')) != 'default' or config.get('rope_scaling'):
    raise ConvertError(
      f'config.json scales rotary positions ({config.get("rope_scaling") or kind!r}); only plain '
      'ones are implemented, as published.'
    )
  found = {ours: count(config, name, _SIZES[ours][2]) for name, ours in _named(config, _SIZES)}
  theta = rope if 'rope_theta' in rope else config
  moe = {ours: default for ours, (_, _, default) in _MOE.items()}
  model = {ours: default for ours, (_, _, default) in _MODEL.items()}
  return found | {
    'name': config.get('openmoe_name'),
    'architecture': Architecture.JETMOE.value,
    'num_sparse_layers': found['num_layers'],
    'moe': moe | of_class(config, _named(config, _MOE), MoEConfig),
    'model': model
    | of_class(config, _named(config, _MODEL), ModelConfig)
    | {'rope_theta': number(theta, 'rope_theta', 10000.0)},
  }


# What transformers' JetMoe computes with and has no field for: field -> the only value.
_UNSAID = {'norm_epsilon': 1e-6}
_UNSAID_MOE = {'router_order': RouterOrder.TOP_K_SOFTMAX}


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """Fields of transformers' JetMoeConfig, without the tokens.

  Raises:
    ConvertError: the model computes with a value that transformers' JetMoe cannot hold.
  """
  for part, names in ((config, _UNSAID), (config.moe, _UNSAID_MOE)):
    for name, only in names.items():
      if getattr(part, name) != only:
        raise ConvertError(
          f'--to hf: {name}={getattr(part, name)} has no field in JetMoeConfig, whose model '
          f'computes with {only}; such a model stays in our form.'
        )
  values = {name: getattr(config, name) for name in _SIZES if name != 'num_experts'}
  values |= {'num_experts': config.moe.num_experts, 'init_std': config.init_std}
  values |= {name: getattr(config.moe, name) for name in _MOE}
  values['final_norm_epsilon'] = config.final_norm_epsilon or config.norm_epsilon
  names = _SIZES | _MOE | _MODEL
  return {names[ours][0]: value for ours, value in values.items()} | {
    'architectures': ['JetMoeForCausalLM'],
    'model_type': MODEL_TYPE,
    'openmoe_name': config.name,
    'activation_function': 'silu',
    'rope_parameters': {'rope_type': 'default', 'rope_theta': config.rope_theta},
    'tie_word_embeddings': True,
    'use_cache': True,
  }
