"""Router and experts of OpenMoE, their capacity conventions and their losses.

Dropless unless the configuration asks otherwise; see OpenMoeConfig.router_capacity.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from .configuration_openmoe import OpenMoeConfig


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
  """Widens bfloat16 and float16; leaves float64 alone."""
  return x.to(torch.promote_types(x.dtype, torch.float32))


def double_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
  """a * silu(b) * up, with a and b the halves of `gate`; not a plain SwiGLU."""
  a, b = gate.chunk(2, dim=-1)
  return a * functional.silu(b) * up


class OpenMoeExperts(nn.Module):
  """Expert weights stacked as (expert, in, out), the layout of the published weights."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__()
    e, d, f = config.num_experts, config.hidden_size, config.intermediate_size
    self.wi_gate = nn.Parameter(torch.empty(e, d, 2 * f))
    self.wi_up = nn.Parameter(torch.empty(e, d, f))
    self.wo = nn.Parameter(torch.empty(e, f, d))

  def forward(self, x, index, weights, served) -> torch.Tensor:
    """[n, d] -> [n, d]: sum over the k choices that are served of weight * expert(x).

    Args:
      index, weights, served: [n, k]; weights in float32 or wider.
    """
    out = torch.zeros_like(x, dtype=weights.dtype)
    for expert in range(len(self.wo)):
      token, choice = torch.where((index == expert) & served)
      rows = x[token]
      hidden = double_gate(rows @ self.wi_gate[expert], rows @ self.wi_up[expert])
      scaled = at_least_float32(hidden @ self.wo[expert]) * weights[token, choice, None]
      out = out.index_add(0, token, scaled)
    return out.to(x.dtype)


class OpenMoeSparseMLP(nn.Module):
  """Router and experts."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__()
    self.config = config
    # A bare parameter of the same name as in the published weights.
    self.gate_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
    self.experts = OpenMoeExperts(config)

  def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None):
    """[b, t, d] -> [b, t, d] and float32 router logits [b * t, e]."""
    flat = x.reshape(-1, x.shape[-1])
    # Routing is float32 also under autocast: rounded logits would flip near ties.
    with torch.autocast(x.device.type, enabled=False):
      logits = functional.linear(at_least_float32(flat), at_least_float32(self.gate_weight))
    probs = logits.softmax(dim=-1)
    # A stable sort takes the lower index of equal experts, as the original does; topk may not.
    top, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    weights, index = top[:, : self.config.router_topk], order[:, : self.config.router_topk]
    if self.config.router_order == 'top_k_softmax':
      weights = logits.gather(-1, index).softmax(dim=-1)
    routed = torch.ones_like(index, dtype=torch.bool)
    if token_mask is not None:
      routed = routed & token_mask.reshape(-1, 1)
    served = routed & self._within_capacity(index, routed)
    return self.experts(flat, index, weights, served).reshape(x.shape), logits

  def _within_capacity(self, index: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """bool [n, k]: the choices that find a slot in their expert's buffer."""
    config, n = self.config, len(index)
    if config.router_capacity == 'dropless':
      return routed
    size = n
    if config.router_capacity != 'colossalai' and n > config.router_group_size:
      size = config.router_group_size
      if n % size:
        raise ValueError(
          f'{n} tokens do not divide into groups of router_group_size={size}; give a batch whose '
          "tokens are a multiple, or router_capacity='dropless'."
        )
    capacity = expert_capacity(config, size, self.training)
    groups = lambda z: z.reshape(n // size, size, -1).transpose(1, 2).reshape(n // size, -1)
    chosen = functional.one_hot(groups(index), config.num_experts) * groups(routed)[..., None]
    # First choices of the whole group take slots before any second one: choices lead the sum.
    slot = (chosen.cumsum(dim=1) * chosen).sum(-1) - 1
    slot = slot.reshape(n // size, -1, size).transpose(1, 2).reshape(n, -1)
    return slot < capacity


def expert_capacity(config: OpenMoeConfig, tokens: int, training: bool) -> int:
  """Slots an expert has for a group of so many tokens, in the configured convention."""
  factor = config.router_capacity_factor_train if training else config.router_capacity_factor_eval
  if config.router_capacity == 'released':
    slots = round(factor * tokens / config.num_experts)
  elif config.router_capacity == 'with_top_k':
    slots = round(factor * config.router_topk * tokens / config.num_experts)
  else:
    slots = math.floor(config.router_topk * factor * tokens / config.num_experts)
    slots += slots % 2
  return max(slots, config.router_min_capacity)


def router_losses(
  router_logits: tuple[torch.Tensor, ...],
  token_mask: torch.Tensor | None,
  top_k: int,
  together: str = 'mean',
) -> tuple[torch.Tensor, torch.Tensor]:
  """(load balance, z) over real tokens, averaged over layers or summed.

  Load balance is E * sum_e f_e P_e with f_e the share of tokens that choose e among their top k
  and P_e its mean probability: top_k at perfect balance; of a sum, f_e is a share of the choices,
  which makes it 1. z is the mean of logsumexp^2.
  """
  balance, z = [], []
  for logits in router_logits:
    real = logits if token_mask is None else logits[token_mask.reshape(-1)]
    probs = real.softmax(-1)
    chosen = torch.sort(probs, dim=-1, descending=True, stable=True)[1][:, :top_k]
    share = functional.one_hot(chosen, probs.shape[-1]).sum(1).float().mean(0)
    balance.append(probs.shape[-1] * (share * probs.mean(0)).sum())
    z.append(real.logsumexp(-1).square().mean())
  if together == 'sum':
    return torch.stack(balance).sum() / top_k, torch.stack(z).sum()
  return torch.stack(balance).mean(), torch.stack(z).mean()
