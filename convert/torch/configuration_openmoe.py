"""Configuration of OpenMoE for Hugging Face Transformers.

Field names are those of the published PyTorch port, so its config.json files are understood. This
file and modeling_openmoe.py are copied beside exported weights: they need transformers and torch
and nothing else.
"""

from transformers import AutoConfig, PreTrainedConfig

ROUTER_CAPACITIES = ('dropless', 'released', 'with_top_k', 'colossalai')
ROUTER_LOSSES = ('mean', 'sum')
ROUTER_ORDERS = ('softmax_top_k', 'top_k_softmax')


class OpenMoeConfig(PreTrainedConfig):
  """Sizes and routing of a model.

  Attributes:
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, head_dim, vocab_size:
      sizes; num_attention_heads * head_dim need not be hidden_size.
    num_experts: 0 for a dense model.
    moe_layer_interval: layer i is sparse iff (i + 1) % moe_layer_interval == 0.
    router_topk: experts per token.
    router_order: 'softmax_top_k' weighs by probabilities over all experts, 'top_k_softmax' by those
      over the chosen ones.
    final_rms_norm_eps: epsilon of the last norm, rms_norm_eps where it is None.
    router_capacity: 'dropless' serves every choice; 'released' is the original JAX system
      (groups of router_group_size tokens, factor without top-k), 'with_top_k' the same with a
      factor that counts top-k, 'colossalai' the published port (one group of all tokens, factor
      with top-k).
    router_capacity_factor_train, router_capacity_factor_eval, router_min_capacity,
      router_group_size: of the conventions with capacity.
    router_aux_loss_factor, router_z_loss_factor, z_loss_factor: weights of load-balance loss,
      router z-loss and logit z-loss.
    router_loss: 'mean' over sparse layers, or 'sum', whose load balance is 1 and not top-k for a
      balanced layer.
    router_balance_loss: formula of load balance that the model was trained with; this model trains
      with 'st_moe' alone.
    router_init_std: standard deviation of a new router.
    label_smoothing: of the cross-entropy.
    output_router_logits: return router logits with the other outputs.
  """

  model_type = 'openmoe'
  keys_to_ignore_at_inference = ['past_key_values']  # noqa: RUF012 (as the base class has it)

  vocab_size: int = 256384
  hidden_size: int = 768
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_key_value_heads: int | None = None
  head_dim: int = 64
  hidden_act: str = 'swiglu'
  max_position_embeddings: int = 2048
  rms_norm_eps: float = 1e-6
  final_rms_norm_eps: float | None = None
  rope_theta: float = 10000.0
  use_cache: bool = True
  pad_token_id: int | None = 0
  bos_token_id: int | None = 0
  eos_token_id: int | list[int] | None = 1
  tie_word_embeddings: bool = False
  attention_dropout: float = 0.0
  init_scale: float = 0.1
  num_experts: int = 16
  moe_layer_interval: int = 4
  router_topk: int = 2
  router_order: str = 'softmax_top_k'
  router_capacity: str = 'dropless'
  router_group_size: int = 4096
  router_capacity_factor_train: float = 1.25
  router_capacity_factor_eval: float = 2.0
  router_min_capacity: int = 4
  router_aux_loss_factor: float = 0.01
  router_z_loss_factor: float = 1e-4
  router_loss: str = 'mean'
  router_balance_loss: str = 'st_moe'
  router_init_std: float = 0.02
  z_loss_factor: float = 1e-4
  label_smoothing: float = 0.0
  output_router_logits: bool = False

  def __post_init__(self, **kwargs):
    if self.num_key_value_heads is None:
      self.num_key_value_heads = self.num_attention_heads
    for name, known in (
      ('router_capacity', ROUTER_CAPACITIES),
      ('router_order', ROUTER_ORDERS),
      ('router_loss', ROUTER_LOSSES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f'{name}={getattr(self, name)!r} is not one of {known}.')
    if self.num_key_value_heads != self.num_attention_heads:
      raise ValueError(
        f'num_key_value_heads={self.num_key_value_heads} must equal num_attention_heads='
        f'{self.num_attention_heads}: OpenMoE has a key and a value for every head.'
      )
    if self.num_experts and not 0 < self.router_topk <= self.num_experts:
      raise ValueError(
        f'router_topk={self.router_topk} must be between 1 and num_experts={self.num_experts}.'
      )
    super().__post_init__(**kwargs)

  def is_sparse(self, layer: int) -> bool:
    """Whether a 0-based layer has experts."""
    return self.num_experts > 0 and (layer + 1) % self.moe_layer_interval == 0


AutoConfig.register(OpenMoeConfig.model_type, OpenMoeConfig, exist_ok=True)

__all__ = ['OpenMoeConfig']
