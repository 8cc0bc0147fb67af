"""What attention experts look at, against the queries and keys that the layer itself makes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from openmoe.atlas.attention import BEHAVIOUR, behaviour, looking
from openmoe.inference.cpu_experts import run_experts
from openmoe.layers.dense import attend
from openmoe.layers.moe import moa
from openmoe.models import build_model
from openmoe.models.decoding import init_decode_cache
from tests.inference import case


def naive(probs_bnkts: np.ndarray, tokens_bt: np.ndarray) -> np.ndarray:
  """[b, t, k, BEHAVIOUR] by loops over queries and keys, mean over heads."""
  b, n, k, t, _ = probs_bnkts.shape
  out = np.zeros((b, t, k, len(BEHAVIOUR)))
  for row in range(b):
    for head in range(n):
      for choice in range(k):
        for q in range(t):
          for s in range(q + 1):
            p = probs_bnkts[row, head, choice, q, s]
            copied = s > 0 and tokens_bt[row, s - 1] == tokens_bt[row, q]
            values = (q - s, -np.log(p), s == 0, s == q - 1, copied)
            out[row, q, choice] += p * np.array(values, float) / n
  return out


def test_it_is_what_the_layer_attends_to(monkeypatch):
  model, seen = case.model('jetmoe'), {}
  tokens = np.array([[0, 5, 9, 5, 9, 33, 5, 9]], np.int32)
  t = tokens.shape[1]

  def watched(query, keys, mask, dtype, scale, **rest):
    seen.update(query=query, key=keys.key, scale=scale)
    return attend(query, keys, mask, dtype, scale, **rest)

  monkeypatch.setattr(moa, 'attend', watched)
  config = dataclasses.replace(model.config)
  with looking(jnp.asarray(tokens)) as looked:
    build_model(config, run_experts=run_experts).apply(
      {'params': model.params}, tokens, jnp.arange(t)[None], jnp.tri(t, dtype=bool)[None],
      init_decode_cache(config, 1, t), 0, method='decode',
    )  # fmt: skip
  logits = jnp.einsum('btknh,bnhs->bnkts', seen['query'], seen['key'][..., :t]) * seen['scale']
  probs = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), logits, -1e30), axis=-1)
  np.testing.assert_allclose(looked[0], naive(np.asarray(probs), tokens), atol=1e-4)


def test_behaviour_of_plain_patterns():
  """A query that looks at the token before; one that looks at what followed its last copy."""
  tokens = jnp.array([[7, 8, 7]])
  previous = jnp.zeros((1, 1, 3, 3)).at[0, 0, 2, 1].set(1.0)
  found = dict(zip(BEHAVIOUR, np.asarray(behaviour(previous, tokens))[0, 2, 0], strict=True))
  assert found == {'distance': 1, 'entropy': 0, 'first': 0, 'previous': 1, 'induction': 1}
