"""Models of transformers, observed as ours are: Mixtral, OLMoE, Qwen3-MoE, JetMoE and their like.

Routers are found by what they are, modules that give logits over the experts, and watched by hooks;
so a model counts whose gate is a `...TopKRouter` or a `...TopKGating`. One row a call and no
padding, so the record of a document is its own. Needs torch and transformers, which are imported
here and nowhere else. No code of a folder is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from openmoe.atlas.forward import Observed
from openmoe.atlas.record import ATTENTION, MLP, Document, Header, RouterId, Writer
from openmoe.atlas.recording import columns_of, write
from openmoe.config import ConfigError
from openmoe.inference.tokenizer import TextTokenizer

_GATE = re.compile(r'(TopKRouter|TopKGating)$')
_LAYER = re.compile(r'\blayers\.(\d+)\.')


@dataclasses.dataclass(frozen=True)
class _Config:
  """What is asked of a model's configuration elsewhere."""

  vocab_size: int


class TransformersModel:
  """A causal language model with routers.

  Args:
    module: of transformers, with its weights.
    vocabulary: of text.
    name: for people.

  Raises:
    ConfigError: it has no routers that are known, or several shapes of them.
  """

  def __init__(self, module: Any, vocabulary: Any, name: str):
    self.module, self.vocabulary, self.name = module.eval(), vocabulary, name
    told = module.config
    self.config = _Config(int(told.vocab_size))
    ids = (_first(told.bos_token_id), _first(told.eos_token_id), 0)
    self.start_id = next(i for i in ids if i is not None)
    gates = []
    for path, gate in module.named_modules():
      layer = _LAYER.search(f'{path}.')
      if layer and _GATE.search(type(gate).__name__):
        kind = ATTENTION if 'attn' in path or 'attention' in path else MLP
        # As they are called: attention before the MLP of a layer.
        gates.append((int(layer[1]), kind != ATTENTION, RouterId(int(layer[1]), kind), gate))
    gates.sort(key=lambda one: one[:2])
    self.routers = tuple(one[2] for one in gates)
    self.gates = tuple(one[3] for one in gates)
    shapes = {(int(gate.num_experts), int(gate.top_k)) for gate in self.gates}
    if len(shapes) != 1:
      raise ConfigError(
        f'{name} ({type(module).__name__}) has {len(self.gates)} known routers of '
        f'{len(shapes)} shapes; models whose gates are TopKRouter or TopKGating modules, all '
        'alike, are recorded.'
      )
    self.num_experts, self.top_k = shapes.pop()

  @classmethod
  def open(cls, folder: str, vocabulary: str | None, dtype: str = 'float32') -> TransformersModel:
    """A model of a folder; its weights are safetensors and its code is transformers' own.

    Raises:
      ConfigError: it cannot be opened so.
    """
    try:
      module = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation='eager',
      )
    except (OSError, ValueError, KeyError) as error:
      raise ConfigError(f'{folder} cannot be opened by transformers: {error}') from error
    name, told = folder.rstrip('/').rsplit('/', 1)[-1], module.config
    return cls(module, TextTokenizer.open(vocabulary or folder, _first(told.eos_token_id)), name)

  def encode_chat(self, messages: Any, answer_follows: bool = True) -> list[int]:
    """Not here: templates of others are code."""
    raise ConfigError(f'{self.name}: conversations are recorded of our own models; give texts.')

  @property
  def fingerprint(self) -> str:
    """sha256 of all parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(self.module.state_dict().items()):
      digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
      digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _first(ids: Any) -> int | None:
  """A token id of a configuration, which may be a list."""
  found = ids[0] if isinstance(ids, list) else ids
  return None if found is None else int(found)


class TransformersForward:
  """See forward.Forward; rows are calls of their own."""

  rows = 1

  def __init__(self, model: TransformersModel, with_probs: bool):
    self._model, self._with_probs = model, with_probs

  @torch.no_grad()
  def __call__(self, rows: Sequence[Sequence[int]]) -> Observed:
    """What one row shows."""
    (row,) = rows
    seen: list[Any] = []
    hooks = [
      gate.register_forward_hook(lambda module, args, out, i=i: seen.append((i, out)))
      for i, gate in enumerate(self._model.gates)
    ]
    try:
      tokens = torch.tensor([list(row)], device=self._model.module.device)
      logits = self._model.module(input_ids=tokens, use_cache=False).logits[0].float()
    finally:
      for hook in hooks:
        hook.remove()
    by_router = dict(seen)
    if len(seen) != len(by_router) or len(by_router) != len(self._model.gates):
      raise ConfigError(f'{self._model.name}: its routers were called {len(seen)} times for a row.')
    found = [self._of_router(by_router[i]) for i in range(len(self._model.gates))]
    log_probs = torch.log_softmax(logits[:-1], dim=-1)
    own = log_probs.gather(1, tokens[0, 1:, None])[:, 0]
    stack = lambda name: np.stack([one[name] for one in found])
    return Observed(
      predicted_bt=logits.argmax(dim=-1)[None].cpu().numpy().astype(np.int32),
      next_log_prob_bt=np.append(own.cpu().numpy(), np.float32(0))[None],
      attention_AbtkB=None,
      probs_RNe=stack('probs') if self._with_probs else None,
      **{f'{n}_RNk': stack(n) for n in ('expert', 'weight', 'slot')},
      **{f'{n}_RN': stack(n) for n in ('lse', 'entropy', 'margin')},
    )

  def _of_router(self, out: Any) -> dict[str, np.ndarray]:
    """What a gate gave: (logits, weights, experts), or a tuple that ends in logits."""
    k, e = self._model.top_k, self._model.num_experts
    parts = [x for x in out if isinstance(x, torch.Tensor)]
    logits = next(x for x in reversed(parts) if x.ndim == 2 and x.shape[1] == e).float()
    expert = next((x for x in parts if x.shape == (len(logits), k) and not x.is_floating_point()),
                  None)  # fmt: skip
    if expert is None:
      top, expert = logits.topk(k, dim=-1)
      weight = torch.softmax(top, dim=-1)
    else:
      logits = parts[0].float()
      weight = next(x for x in parts[1:] if x.shape == expert.shape and x.is_floating_point())
    log_probs = torch.log_softmax(logits, dim=-1)
    ordered = logits.sort(dim=-1, descending=True).values
    plain = {
      'expert': expert,
      'weight': weight.float(),
      'slot': torch.zeros_like(expert),
      'lse': torch.logsumexp(logits, dim=-1),
      'entropy': -(log_probs.exp() * log_probs).sum(dim=-1),
      'margin': ordered[:, k - 1] - ordered[:, min(k, e - 1)],
      'probs': log_probs.exp().to(torch.float16),
    }
    return {name: x.cpu().numpy() for name, x in plain.items()}


def header_of(
  model: TransformersModel, length: int, columns: Sequence[str], about: Mapping[str, Any]
) -> Header:
  """What a record of the model is of; see recording.header_of."""
  told = model.module.config
  jetmoe = told.model_type == 'jetmoe'
  sums = told.model_type == 'mixtral' or jetmoe or bool(getattr(told, 'norm_topk_prob', False))
  return Header(
    model=model.name,
    checkpoint=model.fingerprint,
    vocab_size=model.config.vocab_size,
    num_experts=model.num_experts,
    top_k=model.top_k,
    routers=model.routers,
    length=length,
    rows=1,
    dtype=str(model.module.dtype).removeprefix('torch.'),
    dispatch=f'transformers {transformers.__version__}',
    start_id=model.start_id,
    independent=True,
    weights_sum_to_one=sums,
    columns=tuple(columns),
    **about,
  )


def record(
  model: TransformersModel,
  documents: Iterable[Document],
  out: str,
  length: int,
  *,
  about: Mapping[str, Any],
  probs: bool = True,
  **limits: Any,
) -> Writer:
  """Records documents; see recording.record.

  Args:
    length: longest row, the token that begins it included.
    limits: most_tokens, count, show.
  """
  header = header_of(model, length, columns_of(probs, attention=False), about)
  return write(
    TransformersForward(model, probs), documents, Writer(out, header), model.vocabulary, **limits
  )
