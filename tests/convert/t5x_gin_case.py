"""Gin files that say in t5x's and flaxformer's names what a table of macros says."""

from __future__ import annotations

import pathlib

_COMMON = """
import __main__ as train_script
import seqio
from flax import linen
from flaxformer.architectures.t5 import t5_architecture
from flaxformer.components import dense
from flaxformer.components import embedding
from flaxformer.components.attention import dense_attention
from t5x import adafactor
from t5x import utils

MODEL_DIR = %gin.REQUIRED
VOCABULARY = @seqio.SentencePieceVocabulary()
seqio.SentencePieceVocabulary:
  sentencepiece_model_file = 'gs://bucket/umt5/sentencepiece.model'
  extra_ids = 300
train_script.train:
  model = @models.MODEL()
  model_dir = %MODEL_DIR
  total_steps = %TRAIN_STEPS
  eval_steps = 20
  eval_period = %eval_period
  random_seed = %RANDOM_SEED
  use_hardware_rng = %USE_HARDWARE_RNG
  train_dataset_cfg = @train/utils.DatasetConfig()
  train_eval_dataset_cfg = @train_eval/utils.DatasetConfig()
  checkpoint_cfg = @utils.CheckpointConfig()
train/utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  batch_size = %BATCH_SIZE
  shuffle = %SHUFFLE_TRAIN_EXAMPLES
  seed = None
  use_cached = %USE_CACHED_TASKS
  pack = True
train_eval/utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  batch_size = %eval_batch_size
utils.CheckpointConfig:
  save = @utils.SaveCheckpointConfig()
utils.SaveCheckpointConfig.period = %period
utils.SaveCheckpointConfig.keep = %keep
utils.create_learning_rate_scheduler:
  factors = %factors
  base_learning_rate = %base_learning_rate
  warmup_steps = %warmup_steps
adafactor.Adafactor.decay_rate = 0.8
models.MODEL:
  module = @t5_architecture.DecoderOnly()
  vocabulary = %VOCABULARY
  optimizer_def = @adafactor.Adafactor()
  z_loss = %Z_LOSS
  label_smoothing = %LABEL_SMOOTHING
  loss_normalizing_factor = %LOSS_NORMALIZING_FACTOR
t5_architecture.DecoderOnly:
  shared_token_embedder_factory = @embedding.Embed
  dtype = %ACTIVATION_DTYPE
embedding.Embed:
  num_embeddings = %NUM_EMBEDDINGS
  features = %EMBED_DIM
t5_architecture.DecoderLayer:
  activation_partitioning_dims = %ACTIVATION_PARTITIONING_DIMS
  self_attention = @dense_attention.MultiHeadDotProductAttention()
  mlp = @dense.MlpBlock()
dense_attention.MultiHeadDotProductAttention:
  num_heads = %NUM_HEADS
  head_dim = %HEAD_DIM
  dropout_rate = %DROPOUT_RATE
  kernel_init = @attention_kernel_init/linen.initializers.variance_scaling()
attention_kernel_init/linen.initializers.variance_scaling.scale = %SCALE
dense.MlpBlock.intermediate_dim = %MLP_DIM
dense.MlpBlock.activations = ('swiglu', 'linear')
"""
_DENSE = """
from t5x import models
from t5x import partitioning
from t5x import trainer
train_script.train.partitioner = @partitioning.PjitPartitioner()
train_script.train.trainer_cls = @trainer.Trainer
partitioning.PjitPartitioner.num_partitions = 1
trainer.Trainer:
  num_microbatches = %num_microbatches
  learning_rate_fn = @utils.create_learning_rate_scheduler()
t5_architecture.DecoderOnly.decoder_factory = @t5_architecture.Decoder
t5_architecture.Decoder:
  num_layers = %NUM_DECODER_LAYERS
  layer_factory = @t5_architecture.DecoderLayer
"""
_SPARSE = """
from flaxformer.architectures.moe import moe_architecture
from flaxformer.architectures.moe import moe_layers
from flaxformer.architectures.moe import routing
from t5x.contrib.moe import models
from t5x.contrib.moe import partitioning as moe_partitioning
from t5x.contrib.moe import trainer as moe_trainer
train_script.train.partitioner = @moe_partitioning.MoePjitPartitioner()
train_script.train.trainer_cls = @moe_trainer.MoeTrainer
moe_partitioning.MoePjitPartitioner:
  num_expert_partitions = %NUM_EXPERT_PARTITIONS
  num_partitions = %NUM_MODEL_PARTITIONS
moe_trainer.MoeTrainer:
  num_microbatches = %num_microbatches
  learning_rate_fn = @utils.create_learning_rate_scheduler()
models.MODEL:
  aux_loss_factor = %AUX_LOSS_FACTOR
  router_z_loss_factor = %ROUTER_Z_LOSS_FACTOR
t5_architecture.DecoderOnly.decoder_factory = @moe_architecture.SparseDecoder
moe_architecture.SparseDecoder:
  num_layers = %NUM_DECODER_LAYERS
  num_sparse_layers = %NUM_DECODER_SPARSE_LAYERS
  sparse_layer_factory = @moe_architecture.SparseDecoderLayer
  layer_factory = @t5_architecture.DecoderLayer
moe_architecture.SparseDecoderLayer:
  self_attention = @dense_attention.MultiHeadDotProductAttention()
  mlp = @sparse/moe_layers.MoeLayer()
  extra_mlp = @dense.MlpBlock()
moe_layers.MoeLayer:
  dtype = %MOE_TRUNCATED_DTYPE
  num_experts = %NUM_EXPERTS
  max_group_size = %GROUP_SIZE
  train_capacity_factor = %TRAIN_EXPERT_CAPACITY_FACTOR
  eval_capacity_factor = %EVAL_EXPERT_CAPACITY_FACTOR
  expert = @expert/dense.MlpBlock()
expert/dense.MlpBlock:
  intermediate_dim = %EXPERT_MLP_DIM
  intermediate_dropout_rate = %EXPERT_DROPOUT_RATE
sparse/moe_layers.MoeLayer.router = @routing.TokensChooseMaskedRouter()
routing.TokensChooseMaskedRouter:
  num_selected_experts = %NUM_SELECTED_EXPERTS
  jitter_noise = %JITTER_NOISE
  ignore_padding_tokens = False
"""


def write(folder: pathlib.Path, name: str, macros: dict, more: str = '') -> pathlib.Path:
  """NAME.gin, which includes a model and sets macros; `more` stands at its end."""
  sparse = 'NUM_EXPERTS' in macros
  model = 'MoeDecoderOnlyModel' if sparse else 'DecoderOnlyModel'
  # Imports before the common bindings, as their own first lines.
  imports, bindings = [], []
  for line in (_SPARSE if sparse else _DENSE).splitlines():
    (imports if line.startswith('from') else bindings).append(line)
  text = '\n'.join([*imports, _COMMON, *bindings]).replace('MODEL()', f'{model}()')
  (folder / 'parts').mkdir(exist_ok=True)
  (folder / 'parts/model.gin').write_text(text.replace('models.MODEL:', f'models.{model}:'))
  settings = '\n'.join(f'{name} = {value!r}' for name, value in macros.items())
  path = folder / f'{name}.gin'
  path.write_text(
    f"from __gin__ import dynamic_registration\ninclude 'repo/parts/model.gin'\n{settings}\n{more}"
  )
  return path
