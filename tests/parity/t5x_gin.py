"""The fork's training files against our experiments: python -m tests.parity.t5x_gin T5X FLAXFORMER

T5X and FLAXFORMER are checkouts of XueFuzhao/t5x and XueFuzhao/flaxformer; nothing in them is
imported. Every training file is translated by scripts.import_gin, parsed as a user's gin file, and
every field of every configuration compared with the experiment that stands for it here. The values
of the originals' macros lie in tests/golden/t5x_macros.json, from which a test makes such files
without a checkout; here they are compared with the originals, which --write replaces them by.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import sys
import tempfile

import gin
from absl import flags

from convert.t5x_gin.configuration import REQUIRED, Configuration
from convert.t5x_gin.parse import Macro, Reference
from openmoe.programme import Programme
from scripts import import_gin, train

ROOT = pathlib.Path(__file__).resolve().parents[2]
FACTS = ROOT / 'tests/golden/t5x_macros.json'
EXAMPLES = 't5x/examples/t5/t5_1_1/examples'
# Training file of the fork: (model, experiment) here.
FILES = {
  'openmoe_base': ('openmoe_base', 'openmoe_base'),
  'openmoe_base_stage2': ('openmoe_base', 'openmoe_base_stage2'),
  'openmoe_base_wo_code': ('openmoe_base', 'openmoe_base_wo_code'),
  'openmoe_base_wo_moe': ('openllama_base', 'openmoe_base_wo_moe'),
  'openmoe_base_wo_ul2': ('openmoe_base', 'openmoe_base_wo_ul2'),
  'openllama_base': ('openllama_base', 'openllama_base'),
  'openllama_large': ('openllama_large', 'openllama_large'),
  'openmoe_large': ('openmoe_8b', 'openmoe_8b'),
  'openmoe_large_full_lm_stage2': ('openmoe_8b', 'openmoe_8b'),
  'openmoe_large_orca_sft': ('openmoe_8b', 'openmoe_8b_orca_sft'),
  'openmoe_large_wildchat_sft': ('openmoe_8b', 'openmoe_8b_wildchat_sft'),
  'openmoe_xl': ('openmoe_34b', 'openmoe_34b'),
}
# What is ours alone: labels, memory, the number of pipelines, going on in one directory.
OURS = {'model.name', 'model.remat', 'data.num_shards', 'run.allow_data_change'}
# Stages of one programme share what a file of the original has for itself.
_STAGES = {'run.total_steps', 'eval_data.mixture_or_task_name', 'eval_data.task_feature_lengths'}
KNOWN = {
  'openmoe_large': _STAGES,
  'openmoe_large_full_lm_stage2': {
    'run.total_steps', 'run.eval_period', 'run.checkpoint_period', 'eval_data.batch_size',
  },
  # 8192 never binds: the original takes 4096 on 512 devices.
  'openmoe_xl': {'run.total_steps', 'model.moe.group_size'},
}  # fmt: skip
# Bindings that files set themselves, and the names that they have among the facts.
BINDINGS = {
  '__main__.train.eval_period': 'eval_period',
  't5x.contrib.moe.trainer.MoeTrainer.num_microbatches': 'num_microbatches',
  't5x.trainer.Trainer.num_microbatches': 'num_microbatches',
  't5x.utils.SaveCheckpointConfig.period': 'period',
  't5x.utils.SaveCheckpointConfig.keep': 'keep',
  't5x.utils.create_learning_rate_scheduler.factors': 'factors',
  't5x.utils.create_learning_rate_scheduler.base_learning_rate': 'base_learning_rate',
  't5x.utils.create_learning_rate_scheduler.warmup_steps': 'warmup_steps',
  'train_eval/t5x.utils.DatasetConfig.batch_size': 'eval_batch_size',
}


def facts(found: Configuration) -> dict:
  """Plain values of the macros in use, and of BINDINGS."""
  told = {}
  for bound in found.reached('__main__.train'):
    scope = f'{bound.scope}/' if bound.scope else ''
    if name := BINDINGS.get(f'{scope}{bound.name}'):
      told[name] = bound.value
  for name in found.used:
    value = found.resolve(Macro(name))
    if value != REQUIRED and not isinstance(value, Macro | Reference):
      told[name] = value
  return dict(sorted(told.items()))


def configured(*files: object) -> dict:
  """Arguments of openmoe.train.train from gin files."""
  gin.clear_config()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(['train', *(f'--gin_file={f}' for f in files), "--gin_bindings=MODEL_DIR='x'"])
  try:
    return train.configure()
  finally:
    gin.clear_config()


def _fields(told: object, path: str) -> dict:
  if not dataclasses.is_dataclass(told):
    return {path: told}
  found = {}
  for field in dataclasses.fields(told):
    found |= _fields(getattr(told, field.name), f'{path}.{field.name}')
  return found


def translated(*argv: str) -> str:
  """What scripts.import_gin prints."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
    code = import_gin.main(list(argv))
  if code:
    raise RuntimeError(f'import_gin {argv} ended with {code}')
  return out.getvalue()


def differences(name: str, text: str) -> list[str]:
  """Fields in which a translated file is other than our experiment, beyond the known ones."""
  model, experiment = FILES[name]
  with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place) / 'translated.gin'
    path.write_text(text, encoding='utf-8')
    theirs = configured('gin/runs/pretrain.gin', path)
  given = (f'gin/models/{model}.gin', 'gin/runs/pretrain.gin', f'gin/experiments/{experiment}.gin')
  ours, wrong = configured(*given), []
  for part in ('run', 'model', 'optimizer', 'mesh', 'data', 'eval_data'):
    one, other = theirs[part], ours[part]
    if isinstance(other, Programme):
      mixture = one.mixture_or_task_name
      other = next(s.data for s in other.stages if s.data.mixture_or_task_name == mixture)
    mine = _fields(other, part)
    for path, value in _fields(one, part).items():
      known = path in OURS or path in KNOWN.get(name, ())
      if mine.get(path) != value and not known:
        wrong.append(f'{path}: {value!r} there, {mine.get(path)!r} here')
  return wrong


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('t5x', help='checkout of XueFuzhao/t5x')
  parser.add_argument('flaxformer', help='checkout of XueFuzhao/flaxformer')
  parser.add_argument('--write', action='store_true', help='write the facts down')
  args = parser.parse_args(argv)
  places = [args.t5x, args.flaxformer]
  known = json.loads(FACTS.read_text(encoding='utf-8')) if FACTS.exists() else {}
  found, code = {}, 0
  for name in FILES:
    path = f'{args.t5x}/{EXAMPLES}/{name}.gin'
    found[name] = json.loads(json.dumps(facts(_read(path, places))))
    wrong = differences(name, translated(path, f'--gin_search_paths={",".join(places)}'))
    if found[name] != known.get(name) and not args.write:
      wrong.append('the facts in tests/golden are others')
    print(f'{name}: {"; ".join(wrong) or "the same configurations"}')
    code |= bool(wrong)
  if args.write:
    FACTS.write_text(json.dumps(found, indent=1, sort_keys=True) + '\n', encoding='utf-8')
  return code


def _read(path: str, places: list[str]) -> Configuration:
  found = Configuration([path], places)
  list(found.reached('__main__.train'))  # notes what is used
  return found


if __name__ == '__main__':
  sys.exit(main())
