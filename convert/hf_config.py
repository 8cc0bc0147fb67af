"""config.json of a Hugging Face folder and our configurations, one from the other.

Field names are those of the published PyTorch port, so its folders are read as they are, although
they call themselves model_type "llama".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.tensors import ConvertError
from openmoe.config import CapacityConvention, Dispatch, ModelConfig

MODEL_TYPE = 'openmoe'
PAD, BOS, EOS = 0, 0, 1  # the vocabulary has no BOS of its own: padding begins a text
MAX_POSITIONS = 2048
_FIELDS = {
  'vocab_size': 'vocab_size',
  'num_hidden_layers': 'num_layers',
  'hidden_size': 'embed_dim',
  'intermediate_size': 'mlp_dim',
  'num_attention_heads': 'num_heads',
  'head_dim': 'head_dim',
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
  architecture = (config.get('architectures') or ['?'])[0]
  if config.get('model_type') != MODEL_TYPE and 'openmoe' not in architecture.lower():
    raise ConvertError(
      f'config.json is of {config.get("model_type")!r} ({architecture}), not of OpenMoE.'
    )
  missing = [name for name in _FIELDS if name not in config]
  if missing:
    raise ConvertError(f'config.json lacks {missing}.')
  found = {ours: config[theirs] for theirs, ours in _FIELDS.items()}
  found['name'] = config.get('openmoe_name')
  experts, interval = config.get('num_experts') or 0, config.get('moe_layer_interval') or 0
  found['num_experts'] = experts
  found['num_sparse_layers'] = found['num_layers'] // interval if experts and interval else 0
  if experts:
    found['moe'] = {
      'top_k': config.get('router_topk', 2),
      'capacity_factor': config.get('router_capacity_factor_train', 1.25),
      'eval_capacity_factor': config.get('router_capacity_factor_eval', 2.0),
      'min_expert_capacity': config.get('router_min_capacity', 4),
      'load_balance_weight': config.get('router_aux_loss_factor', 0.01),
      'router_z_weight': config.get('router_z_loss_factor', 1e-4),
    }
  found['model'] = {'rope_theta': float(config.get('rope_theta', 10000.0))}
  return found


def to_hf(config: ModelConfig, dtype: str, step: int | None) -> dict[str, Any]:
  """config.json of a model."""
  fields: dict[str, Any] = {
    'architectures': ['OpenMoeForCausalLM'],
    'auto_map': {
      'AutoConfig': 'configuration_openmoe.OpenMoeConfig',
      'AutoModelForCausalLM': 'modeling_openmoe.OpenMoeForCausalLM',
    },
    'model_type': MODEL_TYPE,
    'openmoe_name': config.name,
    'dtype': dtype,
    'pad_token_id': PAD,
    'bos_token_id': BOS,
    'eos_token_id': EOS,
    'hidden_act': 'swiglu',
    'max_position_embeddings': MAX_POSITIONS,
    'num_key_value_heads': config.num_heads,
    'rms_norm_eps': config.norm_epsilon,
    'rope_theta': config.rope_theta,
    'tie_word_embeddings': False,
    'use_cache': True,
    'z_loss_factor': 1e-4,
  }
  fields |= {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
  if step is not None:
    fields['openmoe_step'] = step
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
  }


def generation() -> dict[str, Any]:
  return {'pad_token_id': PAD, 'bos_token_id': BOS, 'eos_token_id': EOS, 'do_sample': False}


def sources(config: ModelConfig) -> tuple[str, ...]:
  """Python files that go beside the weights."""
  del config
  return ('configuration_openmoe.py', 'experts_openmoe.py', 'modeling_openmoe.py')


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- openmoe
- mixture-of-experts
---

# {name}

{kind} decoder-only language model, {layers} layers, {embed} wide, weights in {dtype}. Converted
with `python -m convert export --to hf`; `conversion_receipt.json` has the digest of every tensor.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

A text begins with token 0, which is also the padding: pass an `attention_mask` that covers it.
Routing is dropless; `router_capacity` in the configuration selects the conventions with capacity.
"""


def card(config: ModelConfig, dtype: str) -> str:
  """README.md with the front matter that the hub reads."""
  kind = f'Mixture-of-experts ({config.moe.num_experts} experts)' if config.moe else 'Dense'
  return _CARD.format(
    name=config.name, kind=kind, layers=config.num_layers, embed=config.embed_dim, dtype=dtype
  )
