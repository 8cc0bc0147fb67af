"""config.json of a Hugging Face folder and our configurations, one from the other.

Field names of OpenMoE are those of the published PyTorch port, so its folders are read as they are,
although they call themselves model_type "llama"; JetMoE's are in convert/hf_jetmoe.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.core.tensors import ConvertError
from convert.formats import hf_jetmoe
from convert.formats.hf_fields import count, of_class, refuse, tokens
from openmoe.checkpoint import fields as fields_lib
from openmoe.checkpoint.description import Description, model_fields
from openmoe.checkpoint.fields import shown
from openmoe.config import Architecture, Dispatch, ModelConfig, MoEConfig

MODEL_TYPE = 'openmoe'
PAD, BOS, EOS = 0, 0, 1  # the vocabulary has no BOS of its own: padding begins a text
MAX_POSITIONS = 2048
MODEL_FIELDS = 'openmoe_model'  # key of all fields of ModelConfig, also what transformers ignores
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
# Theirs -> ours, and what ours is where config.json does not say.
_MODEL = {
  'rope_theta': 'rope_theta',
  'rms_norm_eps': 'norm_epsilon',
  'final_rms_norm_eps': 'final_norm_epsilon',
  'z_loss_factor': 'logit_z_weight',
  'init_scale': 'init_scale',
}
_PUBLISHED = {'rope_theta': 10000.0, 'norm_epsilon': 1e-6, 'logit_z_weight': 1e-4}
_PUBLISHED |= {'final_norm_epsilon': None}
_MOE = {
  'router_topk': 'top_k',
  'router_group_size': 'group_size',
  'router_capacity_factor_train': 'capacity_factor',
  'router_capacity_factor_eval': 'eval_capacity_factor',
  'router_min_capacity': 'min_expert_capacity',
  'router_aux_loss_factor': 'load_balance_weight',
  'router_z_loss_factor': 'router_z_weight',
  'router_loss': 'router_loss',
  'router_balance_loss': 'balance_loss',
  'router_init_std': 'router_init_std',
  'router_order': 'router_order',
  'trained_router_capacity': 'capacity_convention',
}


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
  """Sizes of the model as convert.sizes.of_form takes them.

  Raises:
    ConvertError: the folder is of another architecture, or a size is missing.
  """
  if hf_jetmoe.is_jetmoe(config):
    return hf_jetmoe.sizes(config)
  named = config.get('architectures') or ['?']
  architecture = named[0] if isinstance(named, list) and isinstance(named[0], str) else '?'
  for name, only in _FIXED.items():
    if config.get(name, only) != only:
      raise ConvertError(
        f'config.json has {name}={shown(config[name])}; only {only!r} is implemented, as published.'
      )
  if config.get('model_type') != MODEL_TYPE and 'openmoe' not in architecture.lower():
    raise ConvertError(
      f'config.json is of model_type={shown(config.get("model_type"))} ({shown(architecture)}); '
      'give a folder of OpenMoE or JetMoE.'
    )
  found: dict[str, Any] = {ours: count(config, name) for name, ours in _FIELDS.items()}
  found['name'] = config.get('openmoe_name')
  found['architecture'] = Architecture.OPENMOE.value
  experts = count(config, 'num_experts', 0, least=0)
  interval = count(config, 'moe_layer_interval') if experts else 1
  if found['num_layers'] % interval:
    raise refuse(
      'moe_layer_interval', interval,
      f'a divisor of num_hidden_layers={found["num_layers"]}, as the last layer is a sparse one',
    )  # fmt: skip
  if (kv := config.get('num_key_value_heads')) not in (None, found['num_heads']):
    raise refuse('num_key_value_heads', kv, f'num_attention_heads={found["num_heads"]}')
  found['num_experts'] = experts
  found['num_sparse_layers'] = found['num_layers'] // interval if experts else 0
  found['model'] = _PUBLISHED | of_class(config, _MODEL.items(), ModelConfig)
  if experts:
    found['moe'] = of_class(config, _MOE.items(), MoEConfig)
  return found


def to_hf(described: Description, dtype: str, step: int | None) -> dict[str, Any]:
  """config.json of a checkpoint."""
  config = described.model
  match config.architecture:
    case Architecture.OPENMOE:
      fields, positions = _openmoe(config), MAX_POSITIONS
    case Architecture.JETMOE:
      fields, positions = hf_jetmoe.to_hf(config), hf_jetmoe.MAX_POSITIONS
  # What an import told is told again; rows of training may be shorter than what a model can do.
  length = described.row_length or positions
  fields['max_position_embeddings'] = max(length, positions) if described.objective else length
  fields |= {MODEL_FIELDS: model_fields(config)} | _tokens(described) | {'dtype': dtype}
  return fields if step is None else fields | {'openmoe_step': step}


def _tokens(described: Description) -> dict[str, Any]:
  """Special tokens as transformers names them; numbers and nothing else."""
  eos = described.eos_ids[0] if len(described.eos_ids) == 1 else list(described.eos_ids)
  names = {'pad_token_id': described.pad_id, 'bos_token_id': described.start_id}
  return names | {'eos_token_id': eos}


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
    'num_key_value_heads': config.num_heads,
    'tie_word_embeddings': False,
    'use_cache': True,
  }
  fields |= {theirs: getattr(config, ours) for theirs, ours in (_FIELDS | _MODEL).items()}
  moe = config.moe
  if moe is None:
    return fields | {'num_experts': 0, 'moe_layer_interval': 1}
  routed = {theirs: fields_lib.plain(getattr(moe, ours)) for theirs, ours in _MOE.items()}
  if moe.dispatch is Dispatch.DROPLESS:
    del routed['trained_router_capacity']
  # What the model was trained with is told; the default of our PyTorch model stays dropless.
  routed |= {'num_experts': moe.num_experts, 'router_capacity': 'dropless'}
  return fields | routed | {'moe_layer_interval': config.sparse_period}


def told_tokens(
  config: Mapping[str, Any], more: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
  """Special tokens and context of a folder, as Description has them; what is not told is left out.

  Args:
    config, more: config.json and generation_config.json.

  Raises:
    ConvertError: a token is none of the vocabulary, or the context is no count.
  """
  found: dict[str, Any] = {}
  # The published port of OpenMoE writes ids that its vocabulary does not have.
  if hf_jetmoe.is_jetmoe(config) or config.get('openmoe_step') is not None:
    for name, ours in (('pad_token_id', 'pad_id'), ('bos_token_id', 'start_id')):
      if one := tokens(config.get(name), name, vocab_size, 'config.json'):
        found[ours] = one[0]
    name, eos = 'eos_token_id', {}  # those of config.json first
    for facts, where in ((config, 'config.json'), (more, 'generation_config.json')):
      eos |= dict.fromkeys(tokens(facts.get(name), name, vocab_size, where))
    if eos:
      found['eos_ids'] = tuple(eos)
  for name in ('max_position_embeddings', 'n_positions'):
    if config.get(name) is not None:
      found.setdefault('row_length', count(config, name))
  return found


def generation(described: Description) -> dict[str, Any]:
  """generation_config.json."""
  return _tokens(described) | {'do_sample': False}


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
