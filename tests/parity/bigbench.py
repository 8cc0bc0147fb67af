"""Digests of every prompt of BIG-bench-Lite, to be compared with those of BIG-bench's own code.

  python -m tests.parity.bigbench --tasks_dir DIR --shots K [--task T] --out FILE.json [--dump N]

Writes {task: {leaf: {n, low, mul: {...}, gen: {...}}}} over the whole evaluation set; the leaf is
the subtask's name as seqio sees it, '' without subtasks. A digest is sha256 over the examples in
order, each as compact JSON and a line break in UTF-8:

  sha256_inputs              the stripped prompt
  sha256_choices             the stripped choices, in the order in which BIG-bench lists an
                             example's rows to score (that of target_scores)
  sha256_choices_as_shown    the same in the shuffled order in which the prompt shows them, [] where
                             it shows none
  sha256_target_scores_6dec  '%.6f' of their target scores, in the first order
  sha256_answers             the stripped answers
  sha256_first_targets       the first of them

`fake_b` is the multiple_choice_grade of the scorer crc32(prompt + choice) / 2**32.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from openmoe.config import ConfigError
from openmoe.evaluation.items import ASCII_WHITESPACE, Item, Prediction
from tasks.bigbench import files, metrics, prompts


def digest(values: Iterable[Any]) -> str:
  """sha256 of one compact JSON text a line."""
  total = hashlib.sha256()
  for value in values:
    total.update(json.dumps(value, ensure_ascii=False, separators=(',', ':')).encode() + b'\n')
  return total.hexdigest()


def fake_b(leaf: files.Leaf, items: Sequence[Item], texts: Sequence[str]) -> float:
  """The grade of the scorer that takes a checksum for a log-probability."""
  total = 0.0
  for item, text in zip(items, texts, strict=True):
    log_probs = [zlib.crc32((text + choice).encode()) / 2**32 for choice in item.choices]
    total += metrics.multiple_choice_grade(leaf, item, Prediction(tuple(log_probs)))
  return total / len(items)


def describe(leaf: files.Leaf, items: Sequence[Item], kind: str) -> dict[str, Any]:
  """The digests of one leaf and type."""
  texts = [item.prompt.text() for item in items]
  found = {
    'sha256_inputs': digest(texts),
    'sha256_answers': digest(list(item.answers) for item in items),
    'sha256_first_targets': digest(item.answers[0] for item in items),
  }
  if kind == 'mul':
    shown = ([c.strip(ASCII_WHITESPACE) for c in item.extra['shown']] for item in items)
    scores = (['%.6f' % score for score in item.scores] for item in items)  # noqa: UP031
    found['sha256_choices'] = digest(list(item.choices) for item in items)
    found['sha256_choices_as_shown'] = digest(shown)
    found['sha256_target_scores_6dec'] = digest(scores)
    found['fake_b'] = fake_b(leaf, items, texts)
  return found


def _show(leaf: files.Leaf, kind: str, items: Sequence[Item]) -> str:
  lines = []
  for item in items:
    lines.append(f'=== {leaf.task} {leaf.subtask} {kind} example {item.name}')
    lines.append(item.prompt.text())
    lines.append(f'--- choices {item.choices} scores {item.scores} answers {item.answers}')
  return '\n'.join(lines)


def check_task(directory: str, shots: int, dump: int, name: str) -> tuple[str, dict, str]:
  """(name, entry of the output, dumped examples) of one task."""
  entry, dumped = {}, []
  for leaf in files.load_task(directory, name):
    described = {'n': len(leaf.examples), 'low': leaf.low}
    for kind in leaf.types:
      items = prompts.make_items(leaf, shots, kind)
      described[kind] = describe(leaf, items, kind)
      dumped.append(_show(leaf, kind, items[:dump]))
    entry[leaf.subtask] = described
  return name, entry, '\n'.join(dumped)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tasks_dir', required=True, help='holds the 24 folders')
  parser.add_argument('--shots', type=int, required=True)
  parser.add_argument('--task', action='append', help='one of the 24 (default: all)')
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--dump', type=int, default=0, metavar='N', help='print the first N examples')
  args = parser.parse_args(argv)
  if args.shots < 0 or args.dump < 0:
    parser.error('--shots and --dump are counts: 0 or more.')
  if not args.out.absolute().parent.is_dir():
    parser.error(
      f'--out={args.out}: there is no folder {args.out.absolute().parent}; make it first.'
    )
  try:
    names = args.task or files.TASKS
    files.check_names(names)
    work = functools.partial(check_task, args.tasks_dir, args.shots, args.dump)
    # The largest first: one task's draws come from one generator, so it is the longest anyway.
    order = sorted(names, key=lambda name: name != 'vitaminc_fact_verification')
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
      found = {name: (entry, dumped) for name, entry, dumped in pool.map(work, order)}
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 64
  if args.dump:
    print('\n'.join(found[name][1] for name in names))
  partial = args.out.with_name(f'{args.out.name}.partial')
  partial.write_text(json.dumps({name: found[name][0] for name in names}, indent=1) + '\n')
  partial.replace(args.out)
  return 0


if __name__ == '__main__':
  raise SystemExit(main())
