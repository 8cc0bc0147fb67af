"""What a run prints when it is complete: losses, continuations, and what to try next."""

from __future__ import annotations

import json
import re

import jax
import seqio
from rich.console import Console
from rich.text import Text

from openmoe.checkpoint.paths import absolute, write_whole
from openmoe.config import DataConfig, ModelConfig
from openmoe.inference.model import LanguageModel
from openmoe.observe.text import visible
from openmoe.programme import as_programme
from openmoe.report.build import write_report
from openmoe.report.facts import SAMPLES
from openmoe.train import Result

PREFIX = '[S2S] '  # announces the prefix language model among the UL2 denoisers


def show(result: Result, arguments: dict) -> None:
  """Prints the end of a complete run."""
  run, model = arguments['run'], arguments['model']
  data = as_programme(arguments['data'], run.total_steps).stages[-1].data
  console = Console(highlight=False, soft_wrap=True, markup=False)
  fresh = result.resumed_from != result.step
  console.print()
  console.print(
    f'{visible(model.name)}: {"complete" if fresh else "was complete already"} at step '
    f'{result.step}.'
  )
  if result.validation_loss is not None:
    gap = result.unigram_entropy - result.validation_loss
    console.print(
      f'validation loss {result.validation_loss:.4f} nats; unigram entropy of the validation '
      f'tokens {result.unigram_entropy:.4f}; {gap:.2f} nats under it'
    )
  if run.sample_prompts and jax.process_count() == 1:
    samples = _continuations(result, model, data, run.sample_prompts, run.sample_tokens, console)
    write_whole(absolute(run.model_dir) / SAMPLES, json.dumps(samples, indent=1).encode())
  console.print(
    visible(f"""
Report: {write_report(run.model_dir)}
Pictures: {run.model_dir}/loss.png, {run.model_dir}/experts.png
Next:
  tensorboard --logdir {run.model_dir}/tensorboard
  CHECKPOINT={run.model_dir} bash scripts/run_eval.sh
  OBJECTIVE=full_lm MODEL_DIR={run.model_dir}_full_lm bash scripts/run_pretrain.sh
  bash scripts/run_pretrain.sh --gin.TRAIN_STEPS={2 * result.step}
  MODEL=openmoe_8b EXPERIMENT=openmoe_8b bash scripts/run_pretrain.sh \\
    --dry_run --dry_run_devices=256""")
  )


def _continuations(
  result: Result,
  model: ModelConfig,
  data: DataConfig,
  prompts: tuple[str, ...],
  max_new_tokens: int,
  console: Console,
) -> list[dict[str, str]]:
  source = seqio.get_mixture_or_task(data.mixture_or_task_name)
  vocabulary = source.output_features['targets'].vocabulary
  if 'inputs' in data.task_feature_lengths:
    ids = [
      [*vocabulary.encode(PREFIX), *vocabulary.encode(text), vocabulary.eos_id] for text in prompts
    ]
  else:
    ids = [vocabulary.encode(text) for text in prompts]
  params = jax.device_put(jax.device_get(result.params), jax.local_devices()[0])
  console.print('\nGreedy continuations:')
  results = LanguageModel(model, params, vocabulary).generate(ids, max_new_tokens)
  samples = []
  for text, (found,) in zip(prompts, results, strict=True):
    # A young model likes line breaks: more than two in a row say nothing.
    continuation = re.sub(r'\n\s*\n+', '\n\n', found.text).rstrip()
    console.print(
      Text(visible(text), style='bold'), Text(visible(continuation), style='cyan'), sep=''
    )
    console.print(Text('---', style='dim'))
    samples.append({'prompt': text, 'text': continuation})
  return samples
