"""Classifies texts: python -m scripts.classify {train,evaluate,predict}

  python -m scripts.classify train --checkpoint=runs/jetmoe_tiny --data=train.jsonl --out=FOLDER
  python -m scripts.classify evaluate --classifier=FOLDER --data=test.jsonl
  python -m scripts.classify predict --classifier=FOLDER --data=new.jsonl --out=predicted.jsonl

Records are lines such as {"text": "...", "label": "good"}; labels are texts or whole numbers.
train puts a head on a run, one of its checkpoints or a Hugging Face folder, and trains it, with
--backbone the model below it too. The others take such a folder, or transformers'
JetMoeForSequenceClassification. Exit codes: 64 something cannot be done as asked, 65 data are
damaged or the loss is not finite.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import dataclasses
import json
import sys

from scripts import quiet

quiet.import_tensorflow()

from convert import classifier as folders
from convert.open import DTYPES, find
from openmoe.checkpoint.paths import write_whole
from openmoe.classification import examples
from openmoe.classification.classifier import Classifier, score
from openmoe.classification.fit import FitConfig, fit, new_head


def train(args: argparse.Namespace) -> None:
  """Reads records and checkpoint, trains, and writes the folder."""
  usual = 2e-5 if args.backbone else 1e-3
  rate = usual if args.learning_rate is None else args.learning_rate
  config = FitConfig(args.backbone, args.epochs, args.batch_size, rate, args.seed)
  folders.check_free(args.out)
  folders.check_length(args.max_length)
  records = examples.read(args.data)
  labels = examples.labels_of(records)
  found = find(args.checkpoint, args.vocabulary)
  model = dataclasses.replace(found.told.model, dtype=args.dtype)
  params = {'backbone': found.params(model, None), 'score': new_head(model, len(labels), args.seed)}
  rest = (labels, found.vocabulary, found.told.start_id, args.max_length)
  folders.save(fit(Classifier(model, params, *rest), records, config), args.out)
  print(f'{args.out}: {len(labels)} labels from {len(records)} records')


def opened(args: argparse.Namespace) -> Classifier:
  """The classifier of a command line."""
  options = {'vocabulary': args.vocabulary, 'dtype': args.dtype}
  return folders.open_classifier(args.classifier, **options)


def evaluate(args: argparse.Namespace) -> None:
  """Prints accuracy and macro-F1."""
  records, classifier = examples.read(args.data), opened(args)
  classes = examples.classes(records, classifier.labels)
  guesses = classifier.logits([record.text for record in records], args.batch_size).argmax(axis=1)
  found = score(classes, guesses)
  print(f'accuracy {found.accuracy:.4f}\nmacro-F1 {found.macro_f1:.4f}\nrecords {len(records)}')


def predict(args: argparse.Namespace) -> None:
  """Writes a line of JSON for every record, in order."""
  records, classifier = examples.read(args.data, labelled=False), opened(args)
  chances = classifier.probabilities([record.text for record in records], args.batch_size)
  lines = []
  for record, row in zip(records, chances.tolist(), strict=True):
    named = {str(label): chance for label, chance in zip(classifier.labels, row, strict=True)}
    label = classifier.labels[row.index(max(row))]
    lines.append(json.dumps({'text': record.text, 'label': label, 'probabilities': named}))
  write_whole(args.out, ''.join(f'{line}\n' for line in lines).encode())


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  for work in (train, evaluate, predict):
    one = commands.add_parser(work.__name__, help=work.__doc__)
    one.set_defaults(work=work)
    name = 'checkpoint' if work is train else 'classifier'
    one.add_argument(f'--{name}', required=True, help='what to open')
    one.add_argument('--data', required=True, help='.jsonl, .jsonl.gz or .jsonl.zst')
    one.add_argument('--vocabulary', help='SentencePiece model, where none is known')
    one.add_argument('--dtype', choices=DTYPES, default='float32', help='of activations')
    one.add_argument('--batch_size', type=int, default=16, help='records of a batch')
    if work is not evaluate:
      one.add_argument('--out', required=True, help='what is written')
    if work is train:
      one.add_argument('--backbone', action='store_true', help='train all parameters')
      one.add_argument('--epochs', type=int, default=3)
      one.add_argument('--learning_rate', type=float, help='default 1e-3; 2e-5 with --backbone')
      one.add_argument('--max_length', type=int, default=512, help='tokens of a text; cut there')
      one.add_argument('--seed', type=int, default=0, help='of head, order and dropout')
  args = parser.parse_args(argv)
  args.work(args)


if __name__ == '__main__':
  sys.exit(main())
