"""Where each binding of t5x and flaxformer has its place here: the tables.

Keys are 'module.Class.argument', or 'scope/module.Class.argument' where a scope makes a difference;
the module paths of _SHORT are left out. A binding is placed, or must have the value that our model
always has, or says nothing about what is trained. Anything else could not be placed.
"""

from __future__ import annotations

_SHORT = {
  'flaxformer.architectures.moe.': '',
  'flaxformer.architectures.t5.': '',
  'flaxformer.components.attention.': '',
  'flaxformer.components.': '',
  'flax.linen.initializers.': 'init.',
  'flax.linen.': '',
  't5x.contrib.moe.': 'moe.',
  't5x.': '',
}
ROOTS = {'train': '__main__.train', 'evaluate': '__main__.evaluate'}


def short(name: str) -> str:
  """A name of a binding without the paths of the modules that this is about."""
  for prefix in sorted(_SHORT, key=len, reverse=True):
    if name.startswith(prefix):
      return _SHORT[prefix] + name.removeprefix(prefix)
  return name.removeprefix('__main__.')


_MODEL, _MOE = 'config.ModelConfig.', 'config.MoEConfig.'
_OPTIMIZER, _DATA = 'config.OptimizerConfig.', 'train/config.DataConfig.'
_EVAL = 'eval/config.DataConfig.'

# Of the model, for training and evaluation. Several of one name must agree.
MODEL_PLACES = {
  'embedding.Embed.num_embeddings': f'{_MODEL}vocab_size',
  'output_logits/dense.DenseGeneral.features': f'{_MODEL}vocab_size',
  'moe_architecture.SparseDecoder.num_layers': f'{_MODEL}num_layers',
  't5_architecture.Decoder.num_layers': f'{_MODEL}num_layers',
  'embedding.Embed.features': f'{_MODEL}embed_dim',
  'dense.MlpBlock.intermediate_dim': f'{_MODEL}mlp_dim',
  'dense_attention.MultiHeadDotProductAttention.num_heads': f'{_MODEL}num_heads',
  'dense_attention.MultiHeadDotProductAttention.head_dim': f'{_MODEL}head_dim',
  'moe_architecture.SparseDecoder.num_sparse_layers': f'{_MODEL}num_sparse_layers',
  't5_architecture.DecoderOnly.dtype': f'{_MODEL}dtype',
  'moe_architecture.SparseDecoder.dtype': f'{_MODEL}dtype',
  't5_architecture.Decoder.dtype': f'{_MODEL}dtype',
  'embedding.Embed.dtype': f'{_MODEL}dtype',
  'dense_attention.MultiHeadDotProductAttention.dtype': f'{_MODEL}dtype',
  'dense.MlpBlock.dtype': f'{_MODEL}dtype',
  'moe_layers.MoeLayer.dtype': f'{_MODEL}dtype',
  'layer_norm.T5LayerNorm.dtype': f'{_MODEL}dtype',
  'dropout_factory/Dropout.rate': f'{_MODEL}dropout_rate',
  'dense_attention.MultiHeadDotProductAttention.dropout_rate': f'{_MODEL}dropout_rate',
  'dense.MlpBlock.intermediate_dropout_rate': f'{_MODEL}dropout_rate',
  'output_logits_kernel_init/init.variance_scaling.scale': f'{_MODEL}init_scale',
  'attention_kernel_init/init.variance_scaling.scale': f'{_MODEL}init_scale',
  'mlp_kernel_init/init.variance_scaling.scale': f'{_MODEL}init_scale',
  'expert_kernel_init/init.variance_scaling.scale': f'{_MODEL}init_scale',
  'models.DecoderOnlyModel.z_loss': f'{_MODEL}logit_z_weight',
  'moe.models.MoeDecoderOnlyModel.z_loss': f'{_MODEL}logit_z_weight',
  'moe_layers.MoeLayer.num_experts': f'{_MOE}num_experts',
  'routing.TokensChooseMaskedRouter.num_selected_experts': f'{_MOE}top_k',
  'moe_layers.MoeLayer.max_group_size': f'{_MOE}group_size',
  'moe_layers.MoeLayer.train_capacity_factor': f'{_MOE}capacity_factor',
  'moe_layers.MoeLayer.eval_capacity_factor': f'{_MOE}eval_capacity_factor',
  'moe_layers.MoeLayer.min_expert_capacity': f'{_MOE}min_expert_capacity',
  'moe.models.MoeDecoderOnlyModel.aux_loss_factor': f'{_MOE}load_balance_weight',
  'moe.models.MoeDecoderOnlyModel.router_z_loss_factor': f'{_MOE}router_z_weight',
  'router_init/init.normal.stddev': f'{_MOE}router_init_std',
  'routing.TokensChooseMaskedRouter.jitter_noise': f'{_MOE}jitter_noise',
  'routing.TokensChooseMaskedRouter.ignore_padding_tokens': f'{_MOE}ignore_padding',
}
TRAIN_PLACES = {
  'train.model_dir': 'MODEL_DIR',
  'train.total_steps': 'TRAIN_STEPS',
  'train.eval_period': 'EVAL_PERIOD',
  'train.eval_steps': 'EVAL_STEPS',
  'train.random_seed': 'SEED',
  'train/utils.DatasetConfig.mixture_or_task_name': 'MIXTURE_OR_TASK_NAME',
  'train_eval/utils.DatasetConfig.mixture_or_task_name': f'{_EVAL}mixture_or_task_name',
  'train/utils.DatasetConfig.task_feature_lengths': 'TASK_FEATURE_LENGTHS',
  'train_eval/utils.DatasetConfig.task_feature_lengths': f'{_EVAL}task_feature_lengths',
  'train/utils.DatasetConfig.batch_size': 'BATCH_SIZE',
  'train_eval/utils.DatasetConfig.batch_size': 'EVAL_BATCH_SIZE',
  'train/utils.DatasetConfig.split': f'{_DATA}split',
  'train_eval/utils.DatasetConfig.split': 'EVAL_SPLIT',
  'train/utils.DatasetConfig.shuffle': f'{_DATA}shuffle',
  'train/utils.DatasetConfig.seed': 'DATA_SEED',
  'train/utils.DatasetConfig.use_cached': f'{_DATA}use_cached',
  'train_eval/utils.DatasetConfig.use_cached': f'{_EVAL}use_cached',
  'utils.SaveCheckpointConfig.period': 'CHECKPOINT_PERIOD',
  'utils.SaveCheckpointConfig.keep': 'KEEP_CHECKPOINTS',
  'utils.RestoreCheckpointConfig.path': 'INITIAL_CHECKPOINT',
  'trainer.Trainer.num_microbatches': 'NUM_MICROBATCHES',
  'moe.trainer.MoeTrainer.num_microbatches': 'NUM_MICROBATCHES',
  'partitioning.PjitPartitioner.num_partitions': 'NUM_MODEL_PARTITIONS',
  'moe.partitioning.MoePjitPartitioner.num_partitions': 'NUM_MODEL_PARTITIONS',
  'moe.partitioning.MoePjitPartitioner.num_expert_partitions': 'NUM_EXPERT_PARTITIONS',
  'adafactor.Adafactor.decay_rate': f'{_OPTIMIZER}decay_rate',
  'adafactor.Adafactor.min_dim_size_to_factor': f'{_OPTIMIZER}min_dim_size_to_factor',
  'utils.create_learning_rate_scheduler.factors': f'{_OPTIMIZER}schedule',
  'utils.create_learning_rate_scheduler.base_learning_rate': f'{_OPTIMIZER}learning_rate',
  'utils.create_learning_rate_scheduler.warmup_steps': f'{_OPTIMIZER}warmup_steps',
  'seqio.SentencePieceVocabulary.sentencepiece_model_file': 'VOCABULARY',
}
EVALUATE_PLACES = {
  'evaluate.output_dir': 'OUT_DIR',
  'utils.DatasetConfig.mixture_or_task_name': 'TASKS',
  'utils.RestoreCheckpointConfig.path': 'CHECKPOINT',
  'seqio.SentencePieceVocabulary.sentencepiece_model_file': 'VOCABULARY',
  'models.DecoderOnlyModel.predict_batch_with_aux.num_decodes': 'SAMPLES',
  'moe.models.MoeDecoderOnlyModel.predict_batch_with_aux.num_decodes': 'SAMPLES',
  'decoding.temperature_sample.temperature': 'TEMPERATURE',
  'seqio.Evaluator.num_examples': 'MAX_ITEMS',
}
SCHEDULES = {'constant': 'constant', 'constant * rsqrt_decay': 'rsqrt'}
# The fork's evaluations, by the names of our catalogue.
EVALUATIONS = {
  'trivia_qa_v010_nocontext': 'triviaqa',
  'humaneval': 'humaneval',
  'mmlu': 'mmlu',
  'arc': 'arc_challenge',
  'boolq': 'boolq',
  'lambada': 'lambada',
  'bigbench:bigbench_lite_v1.mix.t5_default_vocab.3_shot.all_examples': 'bigbench_lite',
}
# Beginnings of mixtures' names, and the module of tasks/ that registers them.
MODULES = {
  'mix_': 'pretraining',
  'redpajama_': 'pretraining',
  'the_stack_dedup_': 'pretraining',
  'orca_sft': 'sft',
  'wildchat_gpt4_sft': 'sft',
  'demo_': 'demo',
}

_NORMAL, _CUT = 'normal', 'truncated_normal'
# What our model always has. A value is written as gin files have it.
FIXED = {
  'train.infer_eval_dataset_cfg': (None,),
  'train.use_hardware_rng': (False,),
  'models.DecoderOnlyModel.label_smoothing': (0, None),
  'moe.models.MoeDecoderOnlyModel.label_smoothing': (0, None),
  'moe.models.MoeDecoderOnlyModel.loss_normalizing_factor': ('NUM_REAL_TARGET_TOKENS',),
  'models.DecoderOnlyModel.loss_normalizing_factor': ('NUM_REAL_TARGET_TOKENS',),
  'moe.models.MoeDecoderOnlyModel.inputs_bidirectional_attention': (False,),
  'train/utils.DatasetConfig.pack': (True,),
  'train_eval/utils.DatasetConfig.pack': (True,),
  'train_eval/utils.DatasetConfig.shuffle': (False,),
  'train_eval/utils.DatasetConfig.seed': (42,),
  'utils.DatasetConfig.task_feature_lengths': (None,),
  'utils.SaveCheckpointConfig.dtype': ('float32',),
  'utils.RestoreCheckpointConfig.mode': ('specific',),
  'utils.RestoreCheckpointConfig.dtype': ('float32',),
  'moe.partitioning.MoePjitPartitioner.model_parallel_submesh': (None,),
  'partitioning.PjitPartitioner.model_parallel_submesh': (None,),
  'adafactor.Adafactor.step_offset': (0,),
  'seqio.SentencePieceVocabulary.extra_ids': (300,),
  'moe_architecture.SparseDecoder.sparse_layout': ('%moe_enums.LayerLayout.MIXED',),
  'moe_architecture.SparseDecoderLayer.encoder_decoder_attention': (None,),
  't5_architecture.DecoderLayer.encoder_decoder_attention': (None,),
  't5_architecture.Decoder.position_embedder_factory': (None,),
  'embedding.Embed.attend_dtype': ('float32',),
  'token_embedder_init/init.normal.stddev': (1.0,),
  'output_logits/dense.DenseGeneral.use_bias': (False,),
  'output_logits/dense.DenseGeneral.dtype': ('float32',),
  'dense_attention.MultiHeadDotProductAttention.use_bias': (False,),
  'dense_attention.MultiHeadDotProductAttention.broadcast_dropout': (True,),
  'dense_attention.MultiHeadDotProductAttention.use_rotary_embedding': (True,),
  'dense.MlpBlock.use_bias': (False,),
  'dense.MlpBlock.activations': (('swiglu', 'linear'),),
  'dense.MlpBlock.final_dropout_rate': (0,),
  'dropout_factory/Dropout.broadcast_dims': ((-2,),),
  'routing.TokensChooseMaskedRouter.dtype': ('float32',),
  'sparse_decoder/routing.TokensChooseMaskedRouter.batch_prioritized_routing': (False,),
  'routing.RouterWeights.use_bias': (False,),
  'routing.RouterWeights.dtype': ('float32',),
  **{
    f'{name}_kernel_init/init.variance_scaling.{argument}': (value,)
    for name, kind in {
      'output_logits': _CUT, 'attention': _NORMAL, 'mlp': _CUT, 'expert': _NORMAL,
    }.items()
    for argument, value in (('mode', 'fan_in'), ('distribution', kind))
  },
}  # fmt: skip
# What says nothing about what is trained or asked: layout of memory, records, unused parts.
SILENT = {
  'train.summarize_config_fn',
  'train/utils.DatasetConfig.module',
  'train_eval/utils.DatasetConfig.module',
  'utils.DatasetConfig.module',
  'utils.DatasetConfig.seed',  # of an evaluation, which has no draws in its data
  'utils.DatasetConfig.shuffle',
  'utils.DatasetConfig.use_cached',
  'utils.DatasetConfig.use_custom_packing_ops',
  'utils.DatasetConfig.batch_size',  # rows of an evaluation do not see each other here
  'utils.DatasetConfig.pack',
  'utils.DatasetConfig.split',  # every evaluation has its own
  'utils.SaveCheckpointConfig.save_dataset',  # positions of the data are always saved
  'seqio.Evaluator.logger_cls',
  'seqio.Evaluator.use_memory_cache',
  'moe.trainer.MoeTrainer.num_expert_partitions',  # Adafactor does not see a constant factor
  'moe_layers.MoeLayer.num_expert_partitions',
  'moe_layers.MoeLayer.num_model_partitions',
  'moe.partitioning.compute_num_model_partitions.num_model_partitions',
  'moe.partitioning.compute_num_model_partitions.model_parallel_submesh',
  'moe_architecture.SparseDecoderLayer.activation_partitioning_dims',
  'moe_architecture.SparseDecoderLayer.scanned',
  't5_architecture.DecoderLayer.activation_partitioning_dims',
  't5_architecture.DecoderLayer.scanned',
  'embedding.Embed.cast_input_dtype',
  'embedding.Embed.one_hot',
  'embedding.Embed.name',
  'output_logits/dense.DenseGeneral.kernel_axis_names',
  'dense.MlpBlock.input_axis_name',
  'dense.MlpBlock.output_axis_name',
  'dense.MlpBlock.intermediate_axis_name',
  'dense.MlpBlock.data_sharding_constraints',
  'dense.MlpBlock.activation_partitioning_dims',
  'bias_init/init.normal.stddev',  # there are no biases
}
# Of evaluations alone: how a model is placed, and how it was trained.
SILENT_IN_EVALUATION = {
  'moe.partitioning.MoePjitPartitioner.num_expert_partitions',
  'moe.partitioning.MoePjitPartitioner.num_partitions',
  'partitioning.PjitPartitioner.num_partitions',
  'adafactor.Adafactor.decay_rate',
  'models.DecoderOnlyModel.loss_normalizing_factor',
}
# What may stand where a part is named: all others are of another model.
PARTS = {
  'models.DecoderOnlyModel',
  'moe.models.MoeDecoderOnlyModel',
  'utils.DatasetConfig',
  'utils.CheckpointConfig',
  'utils.RestoreCheckpointConfig',
  'utils.SaveCheckpointConfig',
  'utils.create_learning_rate_scheduler',
  'partitioning.PjitPartitioner',
  'partitioning.standard_logical_axis_rules',
  'moe.partitioning.MoePjitPartitioner',
  'moe.partitioning.standard_logical_axis_rules',
  'moe.partitioning.compute_num_model_partitions',
  'trainer.Trainer',
  'moe.trainer.MoeTrainer',
  'gin_utils.summarize_gin_config',
  'adafactor.Adafactor',
  'adafactor.standard_logical_factor_rules',
  'moe.adafactor_utils.logical_factor_rules',
  'decoding.temperature_sample',
  'seqio.SentencePieceVocabulary',
  'seqio.Evaluator',
  'seqio.PyLoggingLogger',
  'seqio.TensorBoardLogger',
  'seqio.JSONLogger',
  't5_architecture.DecoderOnly',
  't5_architecture.Decoder',
  't5_architecture.DecoderLayer',
  'moe_architecture.SparseDecoder',
  'moe_architecture.SparseDecoderLayer',
  'moe_layers.MoeLayer',
  'routing.TokensChooseMaskedRouter',
  'routing.RouterWeights',
  'dense_attention.MultiHeadDotProductAttention',
  'dense.MlpBlock',
  'dense.DenseGeneral',
  'embedding.Embed',
  'layer_norm.T5LayerNorm',
  'Dropout',
  'init.normal',
  'init.variance_scaling',
}
