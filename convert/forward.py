"""The models in NumPy, one tensor at a time: logits of a checkpoint too large to load.

Read through a form's own names and layout, so that a wrong name or a missed transposition shows in
the result. Float32, dropless, all tokens real; a check of conversions, not a fast model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from convert.core.forms import Form
from convert.core.names import Row, name_table
from openmoe.config import Architecture, ModelConfig

TOKENS = (2, 12)


@dataclasses.dataclass(frozen=True)
class Forward:
  """What a checkpoint computes on some tokens.

  Attributes:
    logits: float32 [b, t, v].
    experts: int [router, b * t, k] chosen experts, best first; empty for a dense model.
    probs: float32 [router, b * t, e].
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
      self._rows[row.layer, row.place] = row

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

    Without a kernel of its own the output layer is the embedding. Pieces differ between forms; in
    float64 the order of sums does not show.
    """
    tied = (None, 'logits_dense/kernel') not in self._rows
    row = self._rows[None, 'token_embedder/embedding' if tied else 'logits_dense/kernel']
    stored, x = self._form.parameter(row), x.astype(np.float64)
    if tied or self._form.transposed(row):
      blocks = [x @ w.astype(np.float64).T for _, w in stored.pieces()]
      return np.concatenate(blocks, axis=-1).astype(np.float32)
    total = np.zeros((*x.shape[:-1], stored.shape[-1]))
    for start, w in stored.pieces():
      total += x[..., start : start + len(w)] @ w.astype(np.float64)
    return total.astype(np.float32)


def _norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def _best(scores: np.ndarray, count: int) -> np.ndarray:
  """Indices of the highest, best first; the earlier one of equals."""
  return np.argsort(-scores, axis=-1, kind='stable')[:, :count]


# --- OpenMoE


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


def _moe(x: np.ndarray, load: _Layers, layer: int, top_k: int, follow: np.ndarray | None):
  """(output, chosen experts, probabilities) of flattened tokens [n, d]."""
  probs = _softmax(x @ load(layer, 'moe/router/kernel'))
  chosen = _best(probs, top_k)
  used = chosen if follow is None else follow
  out = np.zeros_like(x)
  for expert in np.unique(used):
    who = np.any(used == expert, axis=-1)
    names = (f'moe/experts/{w}/kernel' for w in ('wi_0', 'wi_1', 'wo'))
    weights = [load.expert(layer, name, expert) for name in names]
    out[who] += probs[who, expert, None] * _mlp(x[who], *weights)
  return out, chosen, probs


def _openmoe(
  load: _Layers, config: ModelConfig, tokens: np.ndarray, follow: np.ndarray | None
) -> Forward:
  x, chosen, probs = load.embedding(tokens), [], []
  norm = lambda layer, name: _norm(x, load(layer, f'{name}/scale'), config.norm_epsilon)

  def dense(layer: int, name: str, y: np.ndarray) -> np.ndarray:
    return _mlp(y, *(load(layer, f'{name}/{w}/kernel') for w in ('wi_0', 'wi_1', 'wo')))

  for layer in range(config.num_layers):
    x = x + _attention(norm(layer, 'pre_attention_norm'), load, layer, config)
    y = norm(layer, 'pre_mlp_norm')
    if load.has(layer, 'mlp/wo/kernel'):
      x = x + dense(layer, 'mlp', y)
      continue
    router = None if follow is None else follow[len(chosen)]
    out, index, p = _moe(y.reshape(-1, y.shape[-1]), load, layer, config.moe.top_k, router)
    x = x + out.reshape(x.shape)
    x = x + dense(layer, 'extra_mlp', norm(layer, 'pre_extra_mlp_norm'))
    chosen.append(index)
    probs.append(p)
  logits = load.logits(norm(None, 'decoder_norm'))
  return Forward(logits, np.array(chosen), np.array(probs))


# --- JetMoE


class _Mixture:
  """One router's choice for tokens [n, d], and its experts applied to it.

  Attributes:
    chosen: int [n, k], best first.
    probs: [n, e].
  """

  def __init__(
    self,
    x: np.ndarray,
    load: _Layers,
    layer: int,
    place: str,
    top_k: int,
    follow: np.ndarray | None,
  ):
    self._load, self._layer, self._place = load, layer, place
    logits = x @ load(layer, f'{place}/router/kernel')
    self.probs, self.chosen = _softmax(logits), _best(logits, top_k)
    self._used = self.chosen if follow is None else follow
    self._gates = _softmax(np.take_along_axis(logits, self._used, axis=-1))

  def _experts(self, *names: str) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """(tokens, their slots, kernels) of every expert in use."""
    for e in np.unique(self._used):
      paths = (f'{self._place}/{name}/kernel' for name in names)
      kernels = [self._load.expert(self._layer, path, e) for path in paths]
      yield (*np.nonzero(self._used == e), kernels)

  def queries(self, x: np.ndarray, width: int) -> np.ndarray:
    """[n, d] -> [n, k, width]."""
    out = np.empty((*self.chosen.shape, width), np.float32)
    for token, slot, (kernel,) in self._experts('query'):
      out[token, slot] = x[token] @ kernel
    return out

  def outputs(self, x: np.ndarray, width: int) -> np.ndarray:
    """[n, k, heads] -> [n, width], gated and summed over the slots."""
    out = np.zeros((len(x), width), np.float32)
    for token, slot, (kernel,) in self._experts('out'):
      out[token] += self._gates[token, slot, None] * (x[token, slot] @ kernel)
    return out + self._load(self._layer, f'{self._place}/bias')

  def mlp(self, x: np.ndarray) -> np.ndarray:
    """[n, d] -> [n, d]."""
    out = np.zeros_like(x)
    for token, slot, (wi, wo) in self._experts('experts/wi_0', 'experts/wo'):
      a, b = np.split(x[token] @ wi, 2, axis=-1)
      out[token] += self._gates[token, slot, None] * ((_silu(a) * b) @ wo)
    return out + self._load(self._layer, f'{self._place}/bias')


def _attention_heads(
  x: np.ndarray, mixture: _Mixture, load: _Layers, layer: int, config: ModelConfig
) -> np.ndarray:
  """Mixture of attention heads on [b, t, d]."""
  b, t, d = x.shape
  n, h = config.num_heads, config.head_dim
  q = mixture.queries(x.reshape(b * t, d), n * h).reshape(b, t, -1, h)
  k, v = ((x @ load(layer, f'attention/{p}/kernel')).reshape(b, t, n, h) for p in ('key', 'value'))
  q, k = _rotate(q, config.rope_theta), _rotate(k, config.rope_theta)
  scores = np.einsum('btknh,bsnh->bknts', q.reshape(b, t, -1, n, h), k) * np.float32(h**-0.5)
  probs = _softmax(np.where(np.tri(t, dtype=bool), scores, np.float32(-1e10)))
  out = np.einsum('bknts,bsnh->btknh', probs, v).reshape(b * t, -1, n * h)
  return mixture.outputs(out, d).reshape(x.shape)


def _jetmoe(
  load: _Layers, config: ModelConfig, tokens: np.ndarray, follow: np.ndarray | None
) -> Forward:
  x, routers = load.embedding(tokens), []
  flat = (tokens.size, config.embed_dim)

  def mixture(y: np.ndarray, place: str) -> _Mixture:
    router = None if follow is None else follow[len(routers)]
    routers.append(_Mixture(y.reshape(flat), load, layer, place, config.moe.top_k, router))
    return routers[-1]

  for layer in range(config.num_layers):
    y = _norm(x, load(layer, 'pre_attention_norm/scale'), config.norm_epsilon)
    x = x + _attention_heads(y, mixture(y, 'attention'), load, layer, config)
    y = _norm(x, load(layer, 'pre_mlp_norm/scale'), config.norm_epsilon)
    x = x + mixture(y, 'moe').mlp(y.reshape(flat)).reshape(x.shape)
  epsilon = config.final_norm_epsilon or config.norm_epsilon
  logits = load.logits(_norm(x, load(None, 'decoder_norm/scale'), epsilon))
  return Forward(
    logits, np.array([r.chosen for r in routers]), np.array([r.probs for r in routers])
  )


# --- either


def forward(
  form: Form, config: ModelConfig, tokens: np.ndarray, follow: np.ndarray | None = None
) -> Forward:
  """Logits and routing of [b, t] tokens.

  Args:
    follow: Forward.experts of another checkpoint, to send tokens where it sent them; what comes
      back is still this one's own choice. Rounded weights then give nearly the same logits, where
      one token that changes its expert could change them by anything.
  """
  load = _Layers(form, config)
  match config.architecture:
    case Architecture.OPENMOE:
      return _openmoe(load, config, tokens, follow)
    case Architecture.JETMOE:
      return _jetmoe(load, config, tokens, follow)


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
