"""The model in NumPy, one tensor at a time: logits of a checkpoint too large to load.

Read through a form's own names and layout, so that a wrong name or a missed transposition shows in
the result. Float32, dropless, all tokens real; a check of conversions, not a fast model.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.forms import Form
from convert.names import Row, name_table
from openmoe.config import ModelConfig

TOKENS = (2, 12)


@dataclasses.dataclass(frozen=True)
class Forward:
  """What a checkpoint computes on some tokens.

  Attributes:
    logits: float32 [b, t, v].
    experts: int [sparse layer, b * t, k] chosen experts, best first; empty for a dense model.
    probs: float32 [sparse layer, b * t, e].
  """

  logits: np.ndarray
  experts: np.ndarray
  probs: np.ndarray


def seeded_tokens(vocab_size: int, seed: int = 0) -> np.ndarray:
  """int64 [b, t]: 0 begins a row, as in training; no other padding."""
  tokens = np.random.default_rng(seed).integers(2, vocab_size, TOKENS)
  tokens[:, 0] = 0
  return tokens


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-np.clip(x, -80, None)))


def _softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def _rotate(x_btnh: np.ndarray, theta: float) -> np.ndarray:
  t, h = x_btnh.shape[1], x_btnh.shape[-1]
  freq = theta ** (-np.arange(0, h, 2, dtype=np.float32) / h)
  angle = np.arange(t, dtype=np.float32)[:, None] * freq
  sin, cos = (np.concatenate([f(angle)] * 2, axis=-1)[:, None] for f in (np.sin, np.cos))
  first, second = np.split(x_btnh, 2, axis=-1)
  return x_btnh * cos + np.concatenate([-second, first], axis=-1) * sin


class _Layers:
  """Loads parameters by layer and the ending of our path."""

  def __init__(self, form: Form, config: ModelConfig):
    self._form = form
    self._rows: dict[tuple[int | None, str], Row] = {}
    for row in name_table(config):
      place = row.ours.split('/', 2)[-1] if row.layer is not None else row.ours
      self._rows[row.layer, place] = row

  def has(self, layer: int, place: str) -> bool:
    return (layer, place) in self._rows

  def __call__(self, layer: int | None, place: str) -> np.ndarray:
    # One memory layout whatever the form, so that equal weights give equal sums.
    return self._form.load(self._rows[layer, place]).astype(np.float32, order='C')

  def expert(self, layer: int, place: str, expert: int) -> np.ndarray:
    x = self._form.load_expert(self._rows[layer, place], expert)
    return x.astype(np.float32, order='C')

  def embedding(self, tokens: np.ndarray) -> np.ndarray:
    """Only the rows in use are kept."""
    stored = self._form.parameter(self._rows[None, 'token_embedder/embedding'])
    out = np.zeros((*tokens.shape, stored.shape[1]), np.float32)
    for start, x in stored.pieces():
      here = (tokens >= start) & (tokens < start + len(x))
      out[here] = x[tokens[here] - start].astype(np.float32)
    return out

  def logits(self, x: np.ndarray) -> np.ndarray:
    """x @ kernel, over the pieces of a kernel that may be the largest tensor of all.

    Pieces differ between forms; in float64 the order of sums does not show.
    """
    row = self._rows[None, 'logits_dense/kernel']
    stored, x = self._form.parameter(row), x.astype(np.float64)
    if self._form.transposed(row):
      blocks = [x @ w.astype(np.float64).T for _, w in stored.pieces()]
      return np.concatenate(blocks, axis=-1).astype(np.float32)
    total = np.zeros((*x.shape[:-1], stored.shape[-1]))
    for start, w in stored.pieces():
      total += x[..., start : start + len(w)] @ w.astype(np.float64)
    return total.astype(np.float32)


def _attention(x: np.ndarray, load: _Layers, layer: int, config: ModelConfig) -> np.ndarray:
  b, t, _ = x.shape
  heads = (b, t, config.num_heads, config.head_dim)
  q, k, v = (
    (x @ load(layer, f'attention/{n}/kernel')).reshape(heads) for n in ('query', 'key', 'value')
  )
  q, k = _rotate(q, config.rope_theta), _rotate(k, config.rope_theta)
  scores = np.einsum('btnh,bsnh->bnts', q, k)
  probs = _softmax(np.where(np.tri(t, dtype=bool), scores, -1e10))
  out = np.einsum('bnts,bsnh->btnh', probs, v).reshape(b, t, -1)
  return out @ load(layer, 'attention/out/kernel')


def _mlp(x: np.ndarray, wi_0: np.ndarray, wi_1: np.ndarray, wo: np.ndarray) -> np.ndarray:
  a, b = np.split(x @ wi_0, 2, axis=-1)
  return (a * _silu(b) * (x @ wi_1)) @ wo


def _moe(x: np.ndarray, load: _Layers, layer: int, top_k: int):
  """(output, chosen experts, probabilities) of flattened tokens [n, d]."""
  probs = _softmax(x @ load(layer, 'moe/router/kernel'))
  chosen = np.argsort(-probs, axis=-1, kind='stable')[:, :top_k]
  out = np.zeros_like(x)
  for expert in np.unique(chosen):
    who = np.any(chosen == expert, axis=-1)
    names = (f'moe/experts/{w}/kernel' for w in ('wi_0', 'wi_1', 'wo'))
    weights = [load.expert(layer, name, expert) for name in names]
    out[who] += probs[who, expert, None] * _mlp(x[who], *weights)
  return out, chosen, probs


def forward(form: Form, config: ModelConfig, tokens: np.ndarray) -> Forward:
  """Logits and routing of [b, t] tokens."""
  load = _Layers(form, config)
  x, chosen, probs = load.embedding(tokens), [], []

  def norm(layer: int | None, name: str) -> np.ndarray:
    scale = load(layer, f'{name}/scale')
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.norm_epsilon) * scale

  def dense(layer: int, name: str, y: np.ndarray) -> np.ndarray:
    return _mlp(y, *(load(layer, f'{name}/{w}/kernel') for w in ('wi_0', 'wi_1', 'wo')))

  for layer in range(config.num_layers):
    x = x + _attention(norm(layer, 'pre_attention_norm'), load, layer, config)
    y = norm(layer, 'pre_mlp_norm')
    if load.has(layer, 'mlp/wo/kernel'):
      x = x + dense(layer, 'mlp', y)
      continue
    out, index, p = _moe(y.reshape(-1, y.shape[-1]), load, layer, config.moe.top_k)
    x = x + out.reshape(x.shape)
    x = x + dense(layer, 'extra_mlp', norm(layer, 'pre_extra_mlp_norm'))
    chosen.append(index)
    probs.append(p)
  logits = load.logits(norm(None, 'decoder_norm'))
  return Forward(logits, np.array(chosen), np.array(probs))


def agreement(a: Forward, b: Forward) -> dict[str, float]:
  """How two results compare.

  Returns:
    max_logit_difference; largest_logit of `a`; same_top_token, the share of positions with the same
    best token; same_first_expert, the share of (layer, token) with the same first choice.
  """
  same = a.experts[..., 0] == b.experts[..., 0] if a.experts.size else np.ones(1)
  return {
    'max_logit_difference': float(np.max(np.abs(a.logits - b.logits))),
    'largest_logit': float(np.max(np.abs(a.logits))),
    'same_top_token': float(np.mean(a.logits.argmax(-1) == b.logits.argmax(-1))),
    'same_first_expert': float(np.mean(same)),
  }
