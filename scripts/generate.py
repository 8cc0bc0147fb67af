"""Continues texts, or talks: python -m scripts.generate --checkpoint=runs/openmoe_tiny [PROMPT ...]

  python -m scripts.generate --checkpoint=runs/openmoe_tiny 'import os'
  python -m scripts.generate --checkpoint=FOLDER --prompts_file=prompts.txt --samples=4 \\
    --temperature=0.8 --top_p=0.95 --json
  python -m scripts.generate --checkpoint=FOLDER --chat

Prompts are the arguments, the lines of --prompts_file, or standard input as one text. A single
continuation is shown as it comes. --chat puts each prompt into the model's chat template; without
prompts it is a conversation, ended by an empty line or Ctrl-D. --checkpoint is a run directory, one
of its checkpoints, or a Hugging Face folder. Exit code 64: something cannot be run as asked.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

from scripts import quiet

quiet.import_tensorflow()

from absl import app, flags, logging

from openmoe.checkpoint.checkpointer import CheckpointError
from openmoe.config import ConfigError
from openmoe.inference import chat
from openmoe.inference.decode import Sampling
from openmoe.inference.model import LanguageModel
from scripts.load_model import load

EXIT_USAGE = 64

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'runs/openmoe_tiny', 'What to load.')
_DTYPE = flags.DEFINE_string('dtype', 'float32', 'float32 or bfloat16.')
_VOCABULARY = flags.DEFINE_string('vocabulary', None, 'SentencePiece model of a converted run.')
_MAX_LENGTH = flags.DEFINE_integer('max_length', None, 'Tokens of prompt and continuation.')
_CAPACITY = flags.DEFINE_bool('capacity', False, 'Route as in training, with drops.')
_MODEL_PARTITIONS = flags.DEFINE_integer('num_model_partitions', None, 'Default: what fits.')
_EXPERT_PARTITIONS = flags.DEFINE_integer('num_expert_partitions', 1, 'Of the expert axis.')
_FILE = flags.DEFINE_string('prompts_file', None, 'A prompt a line.')
_NEW = flags.DEFINE_integer('max_new_tokens', 64, 'At most so many.')
_STOP = flags.DEFINE_multi_string('stop', [], 'Ends a continuation; repeat for several.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 takes the likeliest token.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw among so many; 0 for all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among the fewest that reach this mass.')
_SAMPLES = flags.DEFINE_integer('samples', 1, 'Continuations of each prompt.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of draws.')
_CHAT = flags.DEFINE_bool('chat', False, 'Prompts are what a user says.')
_SYSTEM = flags.DEFINE_string('system', None, "System message; OpenMoE's own by default.")
_JSON = flags.DEFINE_bool('json', False, 'One JSON object a prompt and nothing else.')


def prompts_from(arguments: list[str]) -> list[str]:
  """Prompts of the command line, none for a conversation.

  Raises:
    ConfigError: there are none, or the file is missing.
  """
  if _FILE.value:
    path = pathlib.Path(_FILE.value)
    if not path.is_file():
      raise ConfigError(f'--prompts_file={path} does not exist.')
    arguments = [*arguments, *(line for line in path.read_text().splitlines() if line)]
  talks = _CHAT.value and sys.stdin.isatty()
  if not arguments and not talks:
    arguments = [text for text in [sys.stdin.read().rstrip('\n')] if text]
  if not arguments and not talks:
    raise ConfigError('There is no prompt: give arguments, --prompts_file, or text on stdin.')
  if '' in arguments:
    raise ConfigError('An argument is an empty prompt; leave it out.')
  return arguments


def _conversation(model: LanguageModel) -> list[dict[str, str]]:
  system = _SYSTEM.value
  if system is None and model.chat_template is chat.OPENMOE:
    system = chat.OPENMOE_SYSTEM
  return [{'role': 'system', 'content': system}] if system else []


def _options(model: LanguageModel) -> dict:
  stop = [*_STOP.value, *(model.chat_template.stop if _CHAT.value else ())]
  sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  return {'stop': stop, 'sampling': sampling, 'seed': _SEED.value}


def _show(piece: str) -> None:
  print(piece, end='', flush=True)


def continue_all(model: LanguageModel, prompts: list[str]) -> None:
  """Prints the continuations of every prompt."""
  if _CHAT.value:
    user = lambda text: [*_conversation(model), {'role': 'user', 'content': text}]
    ids = [model.encode_chat(user(text)) for text in prompts]
  else:
    ids = [list(model.vocabulary.encode(text)) for text in prompts]
  single = len(prompts) == _SAMPLES.value == 1 and not _JSON.value
  if single and not _CHAT.value:
    _show(prompts[0])
  options = _options(model) | {'samples': _SAMPLES.value, 'show': _show if single else None}
  results = model.generate(ids, _NEW.value, **options)
  if single:
    print()
    return
  for prompt, found in zip(prompts, results, strict=True):
    if _JSON.value:
      print(json.dumps({'prompt': prompt, 'continuations': [dataclasses.asdict(g) for g in found]}))
      continue
    for number, generation in enumerate(found, 1):
      print(f'--- {prompt!r}, {number} of {len(found)}, ended by {generation.finish}')
      print(generation.text)


def talk(model: LanguageModel) -> None:
  """A conversation on the terminal; the oldest turns go when it gets too long."""
  print(f'{model.name}. An empty line ends the conversation.', file=sys.stderr)
  first, turns = _conversation(model), []
  while True:
    try:
      said = input('> ')
    except EOFError:
      return
    if not said:
      return
    turns.append({'role': 'user', 'content': said})
    while len(ids := model.encode_chat([*first, *turns])) + 1 + _NEW.value > model.max_length:
      if len(turns) < 3:
        raise ConfigError(
          f'{len(ids)} tokens of this turn and --max_new_tokens={_NEW.value} are more than '
          f'--max_length={model.max_length}; say less, or change these.'
        )
      turns = turns[2:]
    (answer,) = model.generate([ids], _NEW.value, **_options(model), show=_show)[0]
    print()
    turns.append({'role': 'assistant', 'content': answer.text.strip()})


def main(argv: list[str]) -> int:
  logging.set_verbosity(logging.WARNING)
  try:
    prompts = prompts_from(argv[1:])
    model = load(
      _CHECKPOINT.value,
      dtype=_DTYPE.value,
      max_length=_MAX_LENGTH.value,
      vocabulary=_VOCABULARY.value,
      capacity=_CAPACITY.value,
      num_model_partitions=_MODEL_PARTITIONS.value,
      num_expert_partitions=_EXPERT_PARTITIONS.value,
    )
    if prompts:
      continue_all(model, prompts)
    else:
      talk(model)
  except (ConfigError, CheckpointError) as error:
    print(f'error: {error}', file=sys.stderr)
    return EXIT_USAGE
  return 0


if __name__ == '__main__':
  app.run(main)
