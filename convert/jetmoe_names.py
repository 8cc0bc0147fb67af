"""JetMoE's parameters beside the names of transformers' JetMoe classes; pure functions on arrays.

Ours are stacked over the scanned layers and stored [in, out]; theirs are one tensor a layer, stored
[out, in], with keys and values in one. Copies and transposes only: a round trip is bit-exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from openmoe.config import Architecture, ConfigError, Dispatch, ModelConfig, MoEConfig

TIED = 'lm_head.weight'  # the same tensor as the embedding; state dicts repeat it, files do not


@dataclasses.dataclass(frozen=True)
class Row:
  """One foreign tensor.

  Attributes:
    hf: its name.
    ours: '/'-joined paths of the arrays it is made of; several are joined along their outputs.
    layer: index into them, None where they are not stacked.
    transposed: ours are [..., in, out] (or [..., in, 2, f]: a gate), the other [..., out, in].
  """

  hf: str
  ours: tuple[str, ...]
  layer: int | None = None
  transposed: bool = True

  def to_hf(self, *ours: np.ndarray) -> np.ndarray:
    """The foreign tensor from our whole arrays."""
    parts = [x if self.layer is None else x[self.layer] for x in ours]
    if not self.transposed:
      (part,) = parts
      return np.ascontiguousarray(part)
    gated = self.hf.endswith('mlp.input_linear.weight')
    flat = [x.reshape(*x.shape[:-2], -1) if gated else x for x in parts]
    return np.ascontiguousarray(np.concatenate([x.swapaxes(-1, -2) for x in flat], axis=-2))

  def from_hf(self, theirs: np.ndarray, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Our slices, of these shapes, from the foreign tensor.

    Raises:
      ConfigError: the tensor has another size.
    """
    wanted = sum(int(np.prod(shape)) for shape in shapes)
    if theirs.size != wanted:
      raise ConfigError(
        f'{self.hf} has shape {theirs.shape}, {theirs.size} numbers, where the model has {wanted}: '
        f'it is of another size of JetMoE; choose the matching file of gin/models.'
      )
    if not self.transposed:
      return [theirs.reshape(shapes[0])]
    parts = np.split(theirs, len(shapes), axis=-2)
    pairs = zip(parts, shapes, strict=True)
    return [part.swapaxes(-1, -2).reshape(shape) for part, shape in pairs]


# Inside a block: name there -> our paths. Two-dimensional and larger ones are transposed.
_BLOCK = {
  'input_layernorm.weight': ('pre_attention_norm/scale',),
  'self_attention.experts.bias': ('attention/bias',),
  'self_attention.experts.input_linear.weight': ('attention/query/kernel',),
  'self_attention.experts.output_linear.weight': ('attention/out/kernel',),
  'self_attention.experts.router.layer.weight': ('attention/router/kernel',),
  'self_attention.kv_proj.weight': ('attention/key/kernel', 'attention/value/kernel'),
  'post_attention_layernorm.weight': ('pre_mlp_norm/scale',),
  'mlp.bias': ('moe/bias',),
  'mlp.input_linear.weight': ('moe/experts/wi_0/kernel',),
  'mlp.output_linear.weight': ('moe/experts/wo/kernel',),
  'mlp.router.layer.weight': ('moe/router/kernel',),
}


def rows(config: ModelConfig, backbone: str = '') -> Iterator[Row]:
  """Every foreign tensor, in layer order.

  Args:
    backbone: prefix of our paths, 'backbone/' for a sequence classifier.
  """
  yield Row('model.embed_tokens.weight', (f'{backbone}token_embedder/embedding',), transposed=False)
  for layer in range(config.num_layers):
    for theirs, ours in _BLOCK.items():
      paths = tuple(f'{backbone}decoder/{path}' for path in ours)
      vector = ours[0].endswith(('scale', 'bias'))
      yield Row(f'model.layers.{layer}.{theirs}', paths, layer, transposed=not vector)
  yield Row('model.norm.weight', (f'{backbone}decoder_norm/scale',), transposed=False)


def classifier_rows(config: ModelConfig) -> Iterator[Row]:
  """As `rows`, for JetMoeForSequenceClassification and models.classifier."""
  yield from rows(config, 'backbone/')
  yield Row('score.weight', ('score/kernel',))


def to_hf(params: Mapping[str, np.ndarray], table: Iterator[Row]) -> dict[str, np.ndarray]:
  """Foreign tensors from our arrays by '/'-joined path; 266 for the 8B: the tie is not repeated."""
  return {row.hf: row.to_hf(*(params[path] for path in row.ours)) for row in table}


def from_hf(
  get: Callable[[str], np.ndarray], shapes: Mapping[str, tuple[int, ...]], table: Iterator[Row]
) -> dict[str, np.ndarray]:
  """Our arrays by '/'-joined path.

  Args:
    get: foreign tensor by name; asked for one at a time, so a file need not fit into memory twice.
    shapes: of our arrays.

  Raises:
    ConfigError: a tensor has the wrong size, or one of our arrays is filled by none.
  """
  params: dict[str, np.ndarray] = {}
  for row in table:
    theirs = get(row.hf)
    inner = [shapes[path] if row.layer is None else shapes[path][1:] for path in row.ours]
    for path, part in zip(row.ours, row.from_hf(theirs, *inner), strict=True):
      if row.layer is None:
        params[path] = part
        continue
      stacked = params.setdefault(path, np.empty(shapes[path], part.dtype))
      stacked[row.layer] = part
  if missing := sorted(set(shapes) - set(params)):
    raise ConfigError(f'The table of names has no row for {missing}; it is of another model.')
  return params


def hf_config(config: ModelConfig, max_length: int = 4096) -> dict[str, Any]:
  """Fields of transformers' JetMoeConfig."""
  return {
    'model_type': 'jetmoe',
    'vocab_size': config.vocab_size,
    'hidden_size': config.embed_dim,
    'num_hidden_layers': config.num_layers,
    'num_key_value_heads': config.num_heads,
    'kv_channels': config.head_dim,
    'intermediate_size': config.mlp_dim,
    'max_position_embeddings': max_length,
    'activation_function': 'silu',
    'num_local_experts': config.moe.num_experts,
    'num_experts_per_tok': config.moe.top_k,
    'rms_norm_eps': config.final_norm_epsilon or config.norm_epsilon,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': config.rope_theta},
    'initializer_range': config.init_std,
    'aux_loss_coef': config.moe.load_balance_weight,
    'tie_word_embeddings': True,
  }


def model_config(name: str, hf: Mapping[str, Any], dtype: str = 'bfloat16') -> ModelConfig:
  """Our configuration from the fields of a config.json, new names or the first release's.

  Raises:
    ConfigError: not a JetMoE, or a field that changes the computation has another value.
  """
  if hf.get('model_type') != 'jetmoe':
    raise ConfigError(f"model_type={hf.get('model_type')!r} must be 'jetmoe'.")
  if hf.get('activation_function', 'silu') != 'silu' or not hf.get('tie_word_embeddings', True):
    raise ConfigError('Only silu gates and tied embeddings are implemented, as published.')

  def get(name: str, *older: str, default):
    return next((hf[n] for n in (name, *older) if n in hf), default)

  rope = hf.get('rope_parameters') or {}
  moe = MoEConfig(
    num_experts=get('num_local_experts', 'moe_num_experts', default=8),
    top_k=get('num_experts_per_tok', 'moe_top_k', default=2),
    dispatch=Dispatch.DROPLESS,
    router_order='top_k_softmax',
    router_loss='sum',
    ignore_padding=True,
    load_balance_weight=get('aux_loss_coef', default=0.01),
    router_z_weight=0.001,
  )
  layers = get('num_hidden_layers', default=12)
  return ModelConfig(
    name=name,
    architecture=Architecture.JETMOE,
    vocab_size=get('vocab_size', default=32000),
    num_layers=layers,
    num_sparse_layers=layers,
    embed_dim=get('hidden_size', default=2048),
    mlp_dim=get('intermediate_size', 'ffn_hidden_size', default=5632),
    num_heads=get('num_key_value_heads', default=16),
    head_dim=get('kv_channels', default=128),
    moe=moe,
    dtype=dtype,
    init_std=get('initializer_range', default=0.01),
    rope_theta=rope.get('rope_theta', get('rope_theta', default=10000.0)),
    norm_epsilon=1e-6,  # the blocks ignore rms_norm_eps there
    final_norm_epsilon=get('rms_norm_eps', 'layer_norm_epsilon', default=1e-6),
  )
