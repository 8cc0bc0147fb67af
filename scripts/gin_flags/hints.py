"""What a wrong name or value on t5x's command line is answered with."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence

from openmoe import config as config_lib
from openmoe.config import ConfigError

_FIXED = 'is fixed here'
# Macros of t5x and of the fork's files that have another name here, or none.
MACROS = {
  'RANDOM_SEED': 'is SEED here',
  'INITIAL_CHECKPOINT_PATH': 'is INITIAL_CHECKPOINT here',
  'CHECKPOINT_PATH': 'is CHECKPOINT here',
  'EVAL_OUTPUT_DIR': 'is OUT_DIR here',
  'INFER_OUTPUT_DIR': 'is OUT_DIR here',
  'MODEL_PARALLEL_SUBMESH': 'has no counterpart; set NUM_MODEL_PARTITIONS',
  'USE_HARDWARE_RNG': f'{_FIXED}: random numbers are the same on every device',
  'USE_CACHED_TASKS': 'is train/config.DataConfig.use_cached here',
  'SHUFFLE_TRAIN_EXAMPLES': 'is train/config.DataConfig.shuffle here',
  'MIXTURE_OR_TASK_MODULE': 'is an import in a gin file here',
  'VOCABULARY': 'is a path here, read by experiments that include gin/mixtures/umt5.gin',
  'NUM_EXPERTS': 'is config.MoEConfig.num_experts here',
  'GROUP_SIZE': 'is config.MoEConfig.group_size here',
  'TRAIN_EXPERT_CAPACITY_FACTOR': 'is config.MoEConfig.capacity_factor here',
  'EVAL_EXPERT_CAPACITY_FACTOR': 'is config.MoEConfig.eval_capacity_factor here',
  'JITTER_NOISE': 'is config.MoEConfig.jitter_noise here',
  'NUM_SELECTED_EXPERTS': 'is config.MoEConfig.top_k here',
  'AUX_LOSS_FACTOR': 'is config.MoEConfig.load_balance_weight here',
  'ROUTER_Z_LOSS_FACTOR': 'is config.MoEConfig.router_z_weight here',
  'EMBED_DIM': 'is config.ModelConfig.embed_dim here',
  'MLP_DIM': 'is config.ModelConfig.mlp_dim here',
  'EXPERT_MLP_DIM': 'is config.ModelConfig.mlp_dim here, of dense and sparse layers alike',
  'NUM_EMBEDDINGS': 'is config.ModelConfig.vocab_size here',
  'SCALE': 'is config.ModelConfig.init_scale here',
  'ACTIVATION_DTYPE': 'is config.ModelConfig.dtype here',
  'MOE_TRUNCATED_DTYPE': 'is config.ModelConfig.dtype here',
  'EXPERT_DROPOUT_RATE': 'is DROPOUT_RATE here, of all layers alike',
  'NUM_HEADS': 'is config.ModelConfig.num_heads here',
  'HEAD_DIM': 'is config.ModelConfig.head_dim here',
  'NUM_LAYERS': 'is config.ModelConfig.num_layers here',
  'NUM_DECODER_LAYERS': 'is config.ModelConfig.num_layers here',
  'NUM_SPARSE_LAYERS': 'is config.ModelConfig.num_sparse_layers here',
  'NUM_DECODER_SPARSE_LAYERS': 'is config.ModelConfig.num_sparse_layers here',
  'Z_LOSS': 'is config.ModelConfig.logit_z_weight here',
  'LABEL_SMOOTHING': f'{_FIXED} at 0',
  'LOSS_NORMALIZING_FACTOR': f'{_FIXED}: the number of real tokens',
}
# Beginnings of t5x's bindings, the longest that fits first.
BINDINGS = {
  'train.eval_period': 'is EVAL_PERIOD here',
  'train.eval_steps': 'is EVAL_STEPS here',
  'train.total_steps': 'is TRAIN_STEPS here',
  'train.random_seed': 'is SEED here',
  'train.model_dir': 'is MODEL_DIR here',
  'trainer.Trainer.num_microbatches': 'is NUM_MICROBATCHES here',
  'moe_trainer.MoeTrainer.num_microbatches': 'is NUM_MICROBATCHES here',
  'moe_trainer.': 'has no counterpart; config.TrainConfig and config.OptimizerConfig are near',
  'moe_partitioning.': 'is config.MeshConfig here',
  'trainer.': 'has no counterpart; config.TrainConfig and config.OptimizerConfig are near',
  'utils.SaveCheckpointConfig.period': 'is CHECKPOINT_PERIOD here',
  'utils.SaveCheckpointConfig.keep': 'is KEEP_CHECKPOINTS here',
  'utils.SaveCheckpointConfig': 'is CHECKPOINT_PERIOD and KEEP_CHECKPOINTS here',
  'utils.RestoreCheckpointConfig': 'is INITIAL_CHECKPOINT and INITIAL_STATE here',
  'utils.create_learning_rate_scheduler': 'is config.OptimizerConfig here',
  'utils.DatasetConfig.seed': 'is DATA_SEED here',
  'utils.DatasetConfig.batch_size': 'is BATCH_SIZE here',
  'utils.DatasetConfig.pack': f'{_FIXED}: examples are always packed',
  'utils.DatasetConfig': 'is config.DataConfig here',
  'partitioning.': 'is config.MeshConfig here',
  'adafactor.': 'is config.OptimizerConfig here',
  'network.': 'is config.ModelConfig here',
  'models.': 'is config.ModelConfig here',
}
FLAGS = {
  'fdl_config': 'give gin files',
  'fdl_config_file': 'give gin files',
  'fdl_tags': 'give gin files',
  'run_mode': 'each mode is a script here: scripts.train, scripts.evaluate, scripts.generate',
}
T5X_IMPORT = re.compile(r'^\s*(from|import)\s+(t5x|flaxformer|__main__)\b.*', re.MULTILINE)
# The original's run files, and the experiment that says the same here.
RUN_FILES = {
  'openmoe_base': 'openmoe_base',
  'openmoe_base_stage2': 'openmoe_base_stage2',
  'openmoe_base_wo_code': 'openmoe_base_wo_code',
  'openmoe_base_wo_moe': 'openmoe_base_wo_moe',
  'openmoe_base_wo_ul2': 'openmoe_base_wo_ul2',
  'openmoe_large': 'openmoe_8b',
  'openmoe_large_stage2': 'openmoe_8b',
  'openmoe_large_full_lm_stage2': 'openmoe_8b',
  'openmoe_large_orca_sft': 'openmoe_8b_orca_sft',
  'openmoe_large_wildchat_sft': 'openmoe_8b_wildchat_sft',
  'openmoe_xl': 'openmoe_34b',
  'openllama_base': 'openllama_base',
  'openllama_large': 'openllama_large',
}


def counterpart(name: str) -> str | None:
  """What a macro or binding of t5x is here, as a sentence, or None where t5x has none."""
  bare = name.rsplit('/', 1)[-1].removeprefix('train_script.')
  if bare in MACROS:
    return f'{name} of t5x {MACROS[bare]}.'
  fitting = [start for start in BINDINGS if bare.startswith(start)]
  return f'{name} of t5x {BINDINGS[max(fitting, key=len)]}.' if fitting else None


def run_file(name: str) -> str:
  """Which experiment is a run file of the original here, '' for any other file."""
  ours = RUN_FILES.get(name.rsplit('/', 1)[-1].removesuffix('.gin'))
  if ours is None:
    return ''
  return (
    f'That run of the original is gin/experiments/{ours}.gin here, after its gin/models and '
    'gin/runs/pretrain.gin.'
  )


def of_flag(message: str) -> str:
  """What to do in place of t5x's flag that absl's message names, '' for any other."""
  return ' '.join(f'{text}.' for name, text in FLAGS.items() if f"'{name}'" in message)


_QUOTES = '\'"'


def wrong_value(binding: str) -> str | None:
  """A sentence about a value that gin cannot read, or None where it can."""
  name, _, value = (part.strip() for part in binding.partition('='))
  if not value:
    return f'--gin.{name} has no value; write --gin.{name}=VALUE.'
  if re.search(r'[@%]', value):  # a reference, which is gin's to judge
    return None
  try:
    ast.literal_eval(value)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    flag = f'--gin.{name}='
    said = f'{flag}{value}: {value} is no value of gin: a number, True, None, a tuple or a dict; '
    if found := re.match(r'[-+]?0*([0-9][0-9_]*(\.[0-9]*)?)(?=[A-Za-z]|$)', value):
      # 10steps, 2k, 007: somebody wanted a number, or has a name that begins with one.
      said += f'a number stands alone, without units or zeros in front: {flag}{found[1]}; '
    return f'{said}text needs quotes: {flag}"\'{value.strip(_QUOTES)}\'".'
  return None


def _known_names() -> list[str]:
  found = []
  for cls in vars(config_lib).values():
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
      fields = [field.name for field in dataclasses.fields(cls)]
      found += [cls.__name__, *fields, *(f'config.{cls.__name__}.{field}' for field in fields)]
  return sorted(set(found))


def nearest(name: str, known: Iterable[str]) -> str:
  """'Did you mean A or B?', or all there are."""
  known = sorted(known)
  near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.5)
  return f'Did you mean {" or ".join(near)}?' if near else f'There are: {known}.'


def plain_words(error: ConfigError, bindings: Sequence[str]) -> ConfigError:
  """What a configuration refused, without gin's words behind it, and the flag that gave the value.

  Args:
    bindings: NAME=VALUE of the command line.
  """
  said = str(error).partition('\n  In call to configurable')[0]
  value = re.search(r'\.\w+=(.+?) must be', said)
  given = [b for b in bindings if value and b.partition('=')[2].strip() == value[1]]
  found = ConfigError(
    f'{said} It was given by --gin.{" or --gin.".join(given)}.' if given else said
  )
  found.exit_code = error.exit_code
  return found


def explain(error: BaseException, what: str = '') -> ConfigError:
  """A gin error as one for users: what was given, gin's words, and the nearest valid names.

  Args:
    what: the binding or file that it is about.
  """
  within = error.__cause__ or error.__context__
  if isinstance(within, ConfigError):
    return within
  text = ' '.join(str(error).split())
  own = counterpart(what.removeprefix('--gin.').partition('=')[0])
  hints = [own] if own else []
  for word in re.findall(r"['\"`.]([A-Za-z_]\w*)['\"`]", text):
    near = difflib.get_close_matches(word, _known_names(), n=3)
    if near and near[0] != word:
      hints.append(f'{word}: did you mean {" or ".join(near)}?')
  if not hints and what.startswith('--gin.'):
    bare = what.removeprefix('--gin.').partition('=')[0].rsplit('/', 1)[-1]
    near = difflib.get_close_matches(bare, _known_names(), n=3, cutoff=0.4)
    hints += [f'Nearest: {", ".join(near)}.'] if near else []
  return ConfigError(' '.join([f'{what}: {text}' if what else text, *dict.fromkeys(hints)]))
