"""Serves a model over OpenAI's HTTP interface: python -m scripts.serve --checkpoint=FOLDER

  python -m scripts.serve --checkpoint=runs/openmoe_tiny --port=8000
  curl localhost:8000/v1/completions -d '{"prompt": "import", "max_tokens": 8}'

/v1/models, /v1/completions and /v1/chat/completions, streaming too; /health, /metrics, and a chat
page at /. What an answer is does not depend on what else is asked at the same time. Only this
machine is listened to unless --host says otherwise; OPENMOE_API_KEY is a key that clients must
send. Several processes serve one model, each started with --multiprocess and its own
--process_index: the first answers, the others compute with it. SIGTERM or Ctrl-C lets answers
under way end. --checkpoint is a run directory, one of its checkpoints, or a Hugging Face folder.
Exit code 64: something cannot be run as asked.
"""

from __future__ import annotations

from openmoe.observe import command

command.prepare(__name__)

import argparse
import os
import signal
import socket
import sys

from scripts import model_flags, quiet, together_flags

quiet.import_tensorflow()

import jax
import uvicorn

from convert.open import CONTEXT, find, load
from openmoe.config import ConfigError
from openmoe.serving import memory
from openmoe.serving.app import ServeConfig, Server
from openmoe.serving.device import Device
from openmoe.serving.engine import Engine


def run(args: argparse.Namespace) -> None:
  """Opens the model, listens, and serves until a signal."""
  config = ServeConfig(os.environ.get('OPENMOE_API_KEY', ''), args.timeout)
  if args.dry_run:
    found = find(args.checkpoint, args.vocabulary)
    length = args.max_length or max(
      found.told.row_length or 0, CONTEXT[found.told.model.architecture]
    )
    forms = {name: model_flags.of(args)[name] for name in memory.ARGUMENTS}
    print(memory.plan(found.told.model, args.slots, length, **forms))
    return
  with together_flags.joined(args, args.checkpoint):
    serve(args, config)


def serve(args: argparse.Namespace, config: ServeConfig) -> None:
  """Answers in the first process, or does what the first one does."""
  leads = jax.process_index() == 0
  listening = listen(args.host, args.port) if leads else None
  model = load(
    args.checkpoint,
    **model_flags.of(args),
  )
  # uvicorn raises the signal again when all answers have ended: then this is a regular end.
  signal.signal(signal.SIGTERM, lambda number, frame: None)
  if listening is None:
    signal.signal(signal.SIGINT, lambda number, frame: None)  # the first one lets answers end
    Device(model, args.slots).follow()
    return
  engine = Engine(model, args.slots, args.max_queue)
  engine.start()
  print('compiling ...', flush=True)
  engine.warm()
  host, port = listening.getsockname()[:2]
  print(f'{model.name} is served at http://{host}:{port}/ ({args.slots} slots)', flush=True)
  options = {'log_level': 'warning', 'timeout_graceful_shutdown': int(args.timeout) + 1}
  uvicorn.Server(uvicorn.Config(Server(engine, config).app, **options)).run([listening])


def listen(host: str, port: int) -> socket.socket:
  """A socket, before any work is done.

  Raises:
    ConfigError: the address cannot be had.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=512)
  except (OSError, OverflowError) as error:
    raise ConfigError(f'--host={host} --port={port}: {error}; choose another.') from error


@command.guarded
def main(argv: list[str] | None = None) -> None:
  parser = command.Parser(__doc__)
  parser.add_argument('--checkpoint', default='runs/openmoe_tiny', help='what to load')
  parser.add_argument('--host', default='127.0.0.1', help='address to listen at')
  parser.add_argument('--port', type=int, default=8000, help='0 takes a free one')
  parser.add_argument('--slots', type=int, default=16, help='sequences at a time')
  parser.add_argument('--max_queue', type=int, default=64, help='sequences that may wait')
  parser.add_argument('--timeout', type=float, default=600, help='seconds of an answer')
  model_flags.add(parser)
  together_flags.add(parser)
  parser.add_argument('--dry_run', action='store_true', help='say what memory it takes; serve not')
  run(parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
