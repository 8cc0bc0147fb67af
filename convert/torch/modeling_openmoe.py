"""OpenMoE for Hugging Face Transformers: a decoder whose every p-th layer has experts.

Parameter names and layouts are those of the published PyTorch port, so its weights load unchanged;
the code is new. Differences from an ordinary decoder, all from the released models: a cubic gate
(a * silu(b) * up), no 1/sqrt(head_dim) (it is in the query weights), raw router probabilities as
weights, and in sparse layers a dense MLP after the experts.

Tokens that the attention mask leaves out are neither routed nor counted in any loss.
"""

import dataclasses

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_openmoe import OpenMoeConfig
from .experts_openmoe import (
  OpenMoeExperts,
  OpenMoeSparseMLP,
  at_least_float32,
  double_gate,
  router_losses,
)


@dataclasses.dataclass
class OpenMoeModelOutput(ModelOutput):
  """Output of the decoder: hidden states, cache, router logits [tokens, experts] by sparse layer.

  token_mask is bool [batch, length], False on padding; None where there is none.
  """

  last_hidden_state: torch.Tensor | None = None
  past_key_values: Cache | None = None
  hidden_states: tuple[torch.Tensor, ...] | None = None
  attentions: tuple[torch.Tensor, ...] | None = None
  router_logits: tuple[torch.Tensor, ...] | None = None
  token_mask: torch.Tensor | None = None


@dataclasses.dataclass
class OpenMoeCausalLMOutput(ModelOutput):
  """Output of the language model. `loss` is the weighted sum of the four that follow.

  cross_entropy and logit_z_loss are means over labels; load_balance_loss (top-k at perfect
  balance) and router_z_loss are means over sparse layers, or sums; see OpenMoeConfig.router_loss.
  """

  loss: torch.Tensor | None = None
  cross_entropy: torch.Tensor | None = None
  logit_z_loss: torch.Tensor | None = None
  load_balance_loss: torch.Tensor | None = None
  router_z_loss: torch.Tensor | None = None
  logits: torch.Tensor | None = None
  past_key_values: Cache | None = None
  hidden_states: tuple[torch.Tensor, ...] | None = None
  attentions: tuple[torch.Tensor, ...] | None = None
  router_logits: tuple[torch.Tensor, ...] | None = None


class OpenMoeRMSNorm(nn.Module):
  """Root mean square over the last axis in float32, then the scale in the input's dtype."""

  def __init__(self, size: int, eps: float):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(size))
    self.eps = eps

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    wide = at_least_float32(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
    return self.weight * wide.to(x.dtype)


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype):
  """cos and sin [batch, 1, length, head_dim] of half-split rotary embedding; angles in float32."""
  wide = torch.promote_types(dtype, torch.float32)
  exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
  angle = positions[:, None, :, None].to(wide) * theta**-exponent
  angle = torch.cat((angle, angle), dim=-1)
  return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  first, second = x.chunk(2, dim=-1)
  return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
  """softmax(q k) v over [batch, heads, length, head_dim]; softmax in float32 at least."""
  scores = query @ key.transpose(2, 3) * scaling
  if attention_mask is not None:
    scores = scores + attention_mask
  probs = at_least_float32(scores).softmax(dim=-1).to(query.dtype)
  out = functional.dropout(probs, p=dropout, training=module.training) @ value
  return out.transpose(1, 2).contiguous(), probs


class OpenMoeAttention(nn.Module):
  """Causal attention; keys are cached rotated, by the true position of their token."""

  def __init__(self, config: OpenMoeConfig, layer_idx: int):
    super().__init__()
    self.config, self.layer_idx = config, layer_idx
    self.head_dim = config.head_dim
    self.num_key_value_groups = 1
    self.scaling = 1.0  # the released query weights contain 1 / sqrt(head_dim)
    self.is_causal = True
    width = config.num_attention_heads * config.head_dim
    self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
    self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
    self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
    self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

  def forward(self, x, rotary, attention_mask, past_key_values: Cache | None = None, **kwargs):
    shape = (*x.shape[:-1], -1, self.head_dim)
    query, key, value = (
      project(x).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = rotate(query, *rotary), rotate(key, *rotary)
    if past_key_values is not None:
      key, value = past_key_values.update(key, value, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
      self.config._attn_implementation, eager_attention
    )
    dropout = self.config.attention_dropout if self.training else 0.0
    out, probs = attend(
      self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
    )
    return self.o_proj(out.reshape(*x.shape[:-1], -1)), probs


class OpenMoeMLP(nn.Module):
  """Dense MLP; gate_proj is twice as wide as up_proj."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__()
    d, f = config.hidden_size, config.intermediate_size
    self.gate_proj = nn.Linear(d, 2 * f, bias=False)
    self.up_proj = nn.Linear(d, f, bias=False)
    self.down_proj = nn.Linear(f, d, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(double_gate(self.gate_proj(x), self.up_proj(x)))


class OpenMoeDecoderLayer(GradientCheckpointingLayer):
  """Pre-norm layer: attention, then an MLP; or attention, experts and an extra MLP in sequence."""

  def __init__(self, config: OpenMoeConfig, layer_idx: int):
    super().__init__()
    d, eps = config.hidden_size, config.rms_norm_eps
    self.sparse = config.is_sparse(layer_idx)
    self.self_attn = OpenMoeAttention(config, layer_idx)
    self.mlp = OpenMoeSparseMLP(config) if self.sparse else OpenMoeMLP(config)
    self.input_layernorm = OpenMoeRMSNorm(d, eps)
    self.post_attention_layernorm = OpenMoeRMSNorm(d, eps)
    if self.sparse:
      self.pre_extra_mlp_layernorm = OpenMoeRMSNorm(d, eps)
      self.extra_mlp = OpenMoeMLP(config)

  def forward(self, x, rotary, attention_mask, token_mask, past_key_values=None, **kwargs):
    """(hidden states, attention probabilities or None, router logits or None)."""
    out, probs = self.self_attn(
      self.input_layernorm(x), rotary, attention_mask, past_key_values, **kwargs
    )
    x = x + out
    y = self.post_attention_layernorm(x)
    if not self.sparse:
      return x + self.mlp(y), probs, None
    out, router_logits = self.mlp(y, token_mask)
    x = x + out
    return x + self.extra_mlp(self.pre_extra_mlp_layernorm(x)), probs, router_logits


class OpenMoePreTrainedModel(PreTrainedModel):
  config_class = OpenMoeConfig
  base_model_prefix = 'model'
  supports_gradient_checkpointing = True
  _no_split_modules = ['OpenMoeDecoderLayer']  # noqa: RUF012 (as the base class has it)
  _skip_keys_device_placement = ['past_key_values']  # noqa: RUF012
  _supports_sdpa = True
  _supports_flash_attn = True
  _supports_attention_backend = True

  @torch.no_grad()
  def _init_weights(self, module: nn.Module) -> None:
    """As the original: fan-in scaled by init_scale, embeddings 1.0, router router_init_std."""
    scale = lambda fan_in: (self.config.init_scale / fan_in) ** 0.5
    if isinstance(module, nn.Linear):
      init.normal_(module.weight, std=scale(module.in_features))
    elif isinstance(module, nn.Embedding):
      init.normal_(module.weight, std=1.0)
    elif isinstance(module, OpenMoeRMSNorm):
      init.ones_(module.weight)
    elif isinstance(module, OpenMoeSparseMLP):
      init.normal_(module.gate_weight, std=self.config.router_init_std)
    elif isinstance(module, OpenMoeExperts):
      for weight in (module.wi_gate, module.wi_up, module.wo):
        init.normal_(weight, std=scale(weight.shape[1]))
    elif isinstance(module, OpenMoeAttention):
      # Modules are visited inside out, so this replaces what Linear has set.
      std = scale(self.config.hidden_size) / self.config.head_dim**0.5
      init.normal_(module.q_proj.weight, std=std)


class OpenMoeModel(OpenMoePreTrainedModel):
  """The decoder without output layer."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__(config)
    # No padding_idx: token 0 begins every text, and its embedding has to be trained.
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    layers = range(config.num_hidden_layers)
    self.layers = nn.ModuleList([OpenMoeDecoderLayer(config, i) for i in layers])
    last = config.final_rms_norm_eps
    self.norm = OpenMoeRMSNorm(config.hidden_size, config.rms_norm_eps if last is None else last)
    self.gradient_checkpointing = False
    self.post_init()

  def get_input_embeddings(self) -> nn.Module:
    return self.embed_tokens

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.embed_tokens = value

  def forward(
    self,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs,
  ) -> OpenMoeModelOutput:
    """Runs [batch, length] tokens, after those in the cache if there is one.

    Args:
      attention_mask: [batch, length of cache and tokens], 0 on padding; padding may be on either
        side. Positions follow it when position_ids are not given.
    """
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError('Give either input_ids or inputs_embeds.')
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    use_cache = self.config.use_cache if use_cache is None else use_cache
    use_cache = use_cache and not (self.gradient_checkpointing and self.training)
    if use_cache and past_key_values is None:
      past_key_values = DynamicCache(config=self.config)
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    length = x.shape[1]
    token_mask = None
    if attention_mask is not None and attention_mask.dim() == 2:
      token_mask = attention_mask[:, -length:].bool()
    if position_ids is None:
      position_ids = _positions(x, attention_mask, seen)
    causal = create_causal_mask(
      config=self.config,
      inputs_embeds=x,
      attention_mask=attention_mask,
      past_key_values=past_key_values,
      position_ids=position_ids,
    )
    rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
    hidden, attentions, router_logits = [x], [], []
    for layer in self.layers:
      x, probs, logits = layer(x, rotary, causal, token_mask, past_key_values=past_key_values)
      hidden.append(x)
      attentions.append(probs)
      if logits is not None:
        router_logits.append(logits)
    hidden[-1] = x = self.norm(x)
    return OpenMoeModelOutput(
      last_hidden_state=x,
      past_key_values=past_key_values if use_cache else None,
      hidden_states=tuple(hidden) if output_hidden_states else None,
      attentions=tuple(attentions) if output_attentions else None,
      router_logits=tuple(router_logits),
      token_mask=token_mask,
    )


def _positions(x: torch.Tensor, attention_mask: torch.Tensor | None, seen: int) -> torch.Tensor:
  """Positions of the new tokens: how many real tokens come before."""
  if attention_mask is not None and attention_mask.dim() == 2:
    counted = attention_mask.long().cumsum(-1) - 1
    return counted.clamp(min=0)[:, -x.shape[1] :]
  return (torch.arange(x.shape[1], device=x.device) + seen)[None].expand(x.shape[0], -1)


class OpenMoeForCausalLM(OpenMoePreTrainedModel, GenerationMixin):
  """Language model; the output layer is separate from the embedding."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__(config)
    self.model = OpenMoeModel(config)
    self.vocab_size = config.vocab_size
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  def get_output_embeddings(self) -> nn.Module:
    return self.lm_head

  def set_output_embeddings(self, value: nn.Module) -> None:
    self.lm_head = value

  def forward(
    self,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.LongTensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = None,
    output_router_logits: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    num_items_in_batch: torch.Tensor | int | None = None,
    return_dict: bool | None = None,
    **kwargs,
  ) -> OpenMoeCausalLMOutput:
    """Logits, and with labels the loss.

    Args:
      labels: token ids as input_ids, shifted inside; -100 and padding do not count.
      logits_to_keep: compute only the last so many positions, or those given; 0 for all.
      num_items_in_batch: labels of the whole batch that this call is a part of, where the caller
        sums the losses of parts (the Trainer does).
    """
    out = self.model(
      input_ids=input_ids,
      attention_mask=attention_mask,
      position_ids=position_ids,
      past_key_values=past_key_values,
      inputs_embeds=inputs_embeds,
      use_cache=use_cache,
      output_hidden_states=output_hidden_states,
      output_attentions=output_attentions,
    )
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = at_least_float32(self.lm_head(out.last_hidden_state[:, keep]))
    losses = {}
    if labels is not None:
      losses = self._losses(logits, labels, out, num_items_in_batch)
    wanted = self.config.output_router_logits if output_router_logits is None else None
    result = OpenMoeCausalLMOutput(
      **losses,
      logits=logits,
      past_key_values=out.past_key_values,
      hidden_states=out.hidden_states,
      attentions=out.attentions,
      router_logits=out.router_logits if output_router_logits or wanted else None,
    )
    return result if return_dict is not False else result.to_tuple()

  def _losses(self, logits, labels, out: OpenMoeModelOutput, total) -> dict[str, torch.Tensor]:
    """The loss and its four parts."""
    if logits.shape[1] != labels.shape[1]:
      raise ValueError('labels need the logits of all positions: leave logits_to_keep at 0.')
    if out.token_mask is not None:
      labels = labels.masked_fill(~out.token_mask, -100)
    targets = labels[:, 1:].reshape(-1).to(logits.device)
    logits = logits[:, :-1].reshape(-1, logits.shape[-1])
    real = targets != -100
    count = real.sum().clamp(min=1)
    smoothing = self.config.label_smoothing
    summed = functional.cross_entropy(
      logits, targets, ignore_index=-100, reduction='sum', label_smoothing=smoothing
    )
    z = (logits.logsumexp(-1).square() * real).sum()
    config = self.config
    loss = (summed + config.z_loss_factor * z) / count
    losses = {'cross_entropy': summed / count, 'logit_z_loss': z / count}
    if out.router_logits:
      if config.router_balance_loss != 'st_moe':
        raise ValueError(
          f'router_balance_loss={config.router_balance_loss!r} is not computed here; set it to '
          "'st_moe' in the configuration, whose weight is another."
        )
      balance, router_z = router_losses(
        out.router_logits, out.token_mask, config.router_topk, config.router_loss
      )
      loss = loss + config.router_aux_loss_factor * balance + config.router_z_loss_factor * router_z
      losses |= {'load_balance_loss': balance, 'router_z_loss': router_z}
    if total is not None:
      # The caller sums parts: each weighs as its share of the labels.
      total = total.to(loss.device) if torch.is_tensor(total) else total
      loss = loss * count / total
    return {'loss': loss} | losses

  def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
    """The mask that `generate` infers, with the 0 that begins each text kept.

    Padding and beginning of text are the same token, so the base class would hide both.
    """
    mask = super()._prepare_attention_mask_for_generation(
      inputs_tensor, generation_config, model_kwargs
    )
    following = functional.pad(mask[:, 1:], (0, 1))
    first_real = (mask.cumsum(-1) == 0) & (following == 1)
    return mask | first_real.to(mask.dtype)


AutoModelForCausalLM.register(OpenMoeConfig, OpenMoeForCausalLM, exist_ok=True)

__all__ = ['OpenMoeForCausalLM', 'OpenMoeModel', 'OpenMoePreTrainedModel']
