"""config.json of a Hugging Face folder and our configurations, one from the other.

Field names of OpenMoE are those of the published PyTorch port, so its folders are read as they are,
although they call themselves model_type "llama"; JetMoE's are in convert/hf_jetmoe.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.core.tensors import ConvertError
from convert.formats import hf_jetmoe
from openmoe.checkpoint.description import model_fields
from openmoe.config import Architecture, CapacityConvention, Dispatch, ModelConfig

MODEL_TYPE = 'openmoe'
PAD, BOS, EOS = 0, 0, 1  # the vocabulary has no BOS of its own: padding begins a text
MAX_POSITIONS = 2048
MODEL_FIELDS = 'openmoe_model'  # key of all fields of ModelConfig, also what transformers ignores
_TOKENS = {'pad_token_id': PAD, 'bos_token_id': BOS, 'eos_token_id': EOS}
# What config.json tells and ModelConfig has no place for; imports keep it for exports.
_KEPT = (*_TOKENS, 'max_position_embeddings')
_FIELDS = {
  'vocab_size': 'vocab_size',
  'num_hidden_layers': 'num_layers',
  'hidden_size': 'embed_dim',
  'intermediate_size': 'mlp_dim',
  'num_attention_heads': 'num_heads',
  'head_dim': 'head_dim',
}
# What the computation here cannot do otherwise: field -> the only value.
_FIXED = {
  'hidden_act': 'swiglu',
  'tie_word_embeddings': False,
  'rope_scaling': None,
  'attention_bias': False,
}
# ModelConfig's capacity convention -> the name in config.json.
_CAPACITY = {
  CapacityConvention.RELEASED: 'released',
  CapacityConvention.COLOSSALAI: 'colossalai',
}


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
  """Sizes of the model as convert.sizes.of_form takes them.

  Raises:
    ConvertError: the folder is of another architecture, or a size is missing.
  """
  if hf_jetmoe.is_jetmoe(config):
    return hf_jetmoe.sizes(config)
  architecture = (config.get('architectures') or ['?'])[0]
  for name, only in _FIXED.items():
    if config.get(name, only) != only:
      raise ConvertError(
        f'config.json has {name}={config[name]!r}; only {only!r} is implemented, as published.'
      )
  if config.get('model_type') != MODEL_TYPE and 'openmoe' not in architecture.lower():
    raise ConvertError(
      f'config.json is of {config.get("model_type")!r} ({architecture}), not of OpenMoE or JetMoE.'
    )
  missing = [name for name in _FIELDS if name not in config]
  if missing:
    raise ConvertError(f'config.json lacks {missing}.')
  found = {ours: config[theirs] for theirs, ours in _FIELDS.items()}
  found['name'] = config.get('openmoe_name')
  found['architecture'] = Architecture.OPENMOE.value
  experts, interval = config.get('num_experts') or 0, config.get('moe_layer_interval') or 0
  found['num_experts'] = experts
  found['num_sparse_layers'] = found['num_layers'] // interval if experts and interval else 0
  computed = {
    'rope_theta': float(config.get('rope_theta', 10000.0)),
    'norm_epsilon': config.get('rms_norm_eps', 1e-6),
    'final_norm_epsilon': config.get('final_rms_norm_eps'),
    'logit_z_weight': config.get('z_loss_factor', 1e-4),
  }
  found['model'] = computed
  if experts:
    names = {
      'router_topk': 'top_k',
      'router_group_size': 'group_size',
      'router_capacity_factor_train': 'capacity_factor',
      'router_capacity_factor_eval': 'eval_capacity_factor',
      'router_min_capacity': 'min_expert_capacity',
      'router_aux_loss_factor': 'load_balance_weight',
      'router_z_loss_factor': 'router_z_weight',
      'router_order': 'router_order',
      'trained_router_capacity': 'capacity_convention',
    }
    found['moe'] = {ours: config[name] for name, ours in names.items() if name in config}
  return found


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of a config.json that an export of the imported weights should have again.

  None of OpenMoE: all its checkpoints share one vocabulary, and the port's own ids are wrong.
  """
  names = _KEPT if hf_jetmoe.is_jetmoe(config) else ()
  return {name: config[name] for name in names if name in config}


def _is_numbers(value: Any) -> bool:
  """Whether it is a count or a list of them."""
  values = value if isinstance(value, list) else [value]
  return all(type(one) is int and one >= 0 for one in values)


def to_hf(
  config: ModelConfig, dtype: str, step: int | None, kept_fields: Mapping[str, Any]
) -> dict[str, Any]:
  """config.json of a model.

  Args:
    kept_fields: what kept() found where the weights were imported.
  """
  match config.architecture:
    case Architecture.OPENMOE:
      fields = _openmoe(config)
    case Architecture.JETMOE:
      fields = hf_jetmoe.to_hf(config)
  fields |= {MODEL_FIELDS: model_fields(config)}
  # What a checkpoint kept may come from anybody: token ids and lengths, never references to code.
  kept_numbers = {name: kept_fields[name] for name in _KEPT if _is_numbers(kept_fields.get(name))}
  fields |= _TOKENS | {'dtype': dtype} | kept_numbers
  return fields if step is None else fields | {'openmoe_step': step}


def _openmoe(config: ModelConfig) -> dict[str, Any]:
  fields: dict[str, Any] = {
    'architectures': ['OpenMoeForCausalLM'],
    'auto_map': {
      'AutoConfig': 'configuration_openmoe.OpenMoeConfig',
      'AutoModelForCausalLM': 'modeling_openmoe.OpenMoeForCausalLM',
    },
    'model_type': MODEL_TYPE,
    'openmoe_name': config.name,
    'hidden_act': 'swiglu',
    'max_position_embeddings': MAX_POSITIONS,
    'num_key_value_heads': config.num_heads,
    'rms_norm_eps': config.norm_epsilon,
    'final_rms_norm_eps': config.final_norm_epsilon,
    'rope_theta': config.rope_theta,
    'tie_word_embeddings': False,
    'use_cache': True,
    'z_loss_factor': config.logit_z_weight,
  }
  fields |= {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
  moe = config.moe
  if moe is None:
    return fields | {'num_experts': 0, 'moe_layer_interval': 1}
  convention = 'dropless'
  if moe.dispatch is not Dispatch.DROPLESS and moe.capacity_convention in _CAPACITY:
    # What the model was trained with; the default of our PyTorch model stays dropless.
    fields['trained_router_capacity'] = _CAPACITY[moe.capacity_convention]
  return fields | {
    'num_experts': moe.num_experts,
    'moe_layer_interval': config.sparse_period,
    'router_topk': moe.top_k,
    'router_capacity': convention,
    'router_group_size': moe.group_size,
    'router_capacity_factor_train': moe.capacity_factor,
    'router_capacity_factor_eval': moe.eval_capacity_factor,
    'router_min_capacity': moe.min_expert_capacity,
    'router_aux_loss_factor': moe.load_balance_weight,
    'router_z_loss_factor': moe.router_z_weight,
    'router_order': moe.router_order.value,
  }


def generation(kept_fields: Mapping[str, Any]) -> dict[str, Any]:
  """generation_config.json."""
  tokens = {name: kept_fields.get(name, default) for name, default in _TOKENS.items()}
  return tokens | {'do_sample': False}


def sources(config: ModelConfig) -> tuple[str, ...]:
  """Python files that go beside the weights: none where transformers has the model."""
  if config.architecture is Architecture.JETMOE:
    return ()
  return ('configuration_openmoe.py', 'experts_openmoe.py', 'modeling_openmoe.py')


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- {architecture}
- mixture-of-experts
---

# {name}

{kind} decoder-only language model, {layers} layers, {embed} wide, weights in {dtype}. Converted
with `python -m convert export --to hf`; `conversion_receipt.json` has the digest of every tensor.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{remote})
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```
{notes}"""
_OPENMOE_NOTES = """
A text begins with token 0, which is also the padding: pass an `attention_mask` that covers it.
Routing is dropless; `router_capacity` in the configuration selects the conventions with capacity.
"""


def card(config: ModelConfig, dtype: str) -> str:
  """README.md with the front matter that the hub reads."""
  kind = f'Mixture-of-experts ({config.moe.num_experts} experts)' if config.moe else 'Dense'
  own = config.architecture is Architecture.OPENMOE
  return _CARD.format(
    name=config.name,
    architecture=config.architecture.value,
    kind=kind,
    layers=config.num_layers,
    embed=config.embed_dim,
    dtype=dtype,
    remote=', trust_remote_code=True' if own else '',
    notes=_OPENMOE_NOTES if own else '',
  )
