"""Answers MT-Bench: python -m scripts.mt_bench CHECKPOINT --questions FILE --model_id NAME

FILE is FastChat's question.jsonl. Answers go to --out (default: mt_bench/model_answer/NAME.jsonl),
where FastChat's judge looks for them; run again, those that are there are kept.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import pathlib
import sys

from scripts import quiet

quiet.import_tensorflow()

from rich.progress import track

from openmoe.data import files
from openmoe.inference.decode import Sampling
from tasks.evaluation import mt_bench


def load_model(checkpoint: str, dtype: str):
  from convert import open as loading

  return loading.load(checkpoint, **({'dtype': dtype} if dtype else {}))


def run(args: argparse.Namespace) -> pathlib.Path:
  """Answers what is not answered yet; returns where."""
  questions = mt_bench.read_questions(args.questions)
  system = files.read_text(args.system_file).strip() if args.system_file else None
  out = pathlib.Path(args.out or f'mt_bench/model_answer/{args.model_id}.jsonl')
  answers = mt_bench.read_answers(out)
  done = {answer['question_id'] for answer in answers}
  left = [question for question in questions if question['question_id'] not in done]
  if left:
    model = load_model(args.checkpoint, args.dtype)
    sampling = lambda heat: Sampling(temperature=heat)
    found = mt_bench.answer(model, left, sampling, args.conversation, system, args.seed)
    for answer in track(found, total=len(left), description='answers'):
      answers.append(mt_bench.stamped(answer, args.model_id))
      mt_bench.write_answers(out, answers)
  return out


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('checkpoint', help='run directory, checkpoint or Hugging Face folder')
  parser.add_argument('--questions', required=True, help="FastChat's question.jsonl")
  parser.add_argument('--model_id', required=True)
  parser.add_argument('--out', help='answer file')
  parser.add_argument('--conversation', choices=mt_bench.CONVERSATIONS, default=mt_bench.CHAT)
  parser.add_argument('--system_file', help="system text (default: that of the model's page)")
  parser.add_argument('--dtype', default='')
  parser.add_argument('--seed', type=int, default=0)
  print(run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
