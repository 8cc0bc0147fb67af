"""Two processes of four devices: what they generate, score and serve is that of one."""

import concurrent.futures
import json
import socket

import pytest

from tests.run_case import child
from tests.serving.test_http import call

CODE = """
import dataclasses, json, signal, socket, sys, threading
import jax
address, index, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if index >= 0:
  jax.distributed.initialize(address, 2, index)
import uvicorn
from openmoe.inference.decode import Sampling
from openmoe.inference.model import LanguageModel
from openmoe.inference.placement import inference_mesh
from openmoe.serving.app import Server
from openmoe.serving.device import Device
from openmoe.serving.engine import Engine
from tests.inference import case

case.CONFIGS['openmoe'] = dataclasses.replace(case.CONFIGS['openmoe'], num_heads=8)
config, params = case.CONFIGS['openmoe'], case.parameters('openmoe')
if index >= 0:
  mesh = inference_mesh(config, jax.devices())
  from convert.open import _placed
  from openmoe.inference.placement import expert_form
  params = jax.tree.map(lambda x: jax.device_get(x), params)
  held = _placed(params, config, mesh, expert_form(config, mesh, False))
  options = {'mesh': mesh, 'unstacked': True}
else:
  held, options = params, {}
model = LanguageModel(config, held, case.Numbers(), max_length=64, batch_rows=4, **options)
prompts = [[5, 6, 7], [9], [4, 4, 8]]
told = {'devices': jax.device_count(), 'fingerprint': model.fingerprint}
told['greedy'] = [g[0].tokens for g in model.generate(prompts, 6)]
told['drawn'] = [g[0].tokens for g in model.generate(prompts, 6, sampling=Sampling(0.9), seed=3)]
told['scores'] = [s.log_prob for s in model.score([(p, (7, 8)) for p in prompts])]
if index <= 0:
  print('TOLD ' + json.dumps(told), flush=True)
if index == 1:
  Device(model, 4).follow()
else:
  engine = Engine(model, 4, 8)
  engine.start()
  listening = socket.create_server(('127.0.0.1', port))
  server = uvicorn.Server(uvicorn.Config(Server(engine).app, log_level='warning'))
  signal.signal(signal.SIGTERM, lambda number, frame: None)
  print('SERVES', flush=True)
  server.run([listening])
print('ENDED', flush=True)
"""


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def wait_for(process, word: str) -> str:
  said = []
  for line in iter(process.stdout.readline, ''):
    said.append(line)
    if line.startswith(word):
      return line.removeprefix(word)
  raise AssertionError(''.join(said))


def answers_of(index_devices):
  """(what generation and scoring gave, what the server answered) of some processes."""
  address, port = f'127.0.0.1:{free_port()}', free_port()
  processes = [
    child(
      CODE,
      address,
      index,
      port,
      env={'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'},
    )
    for index, devices in index_devices
  ]
  try:
    told = json.loads(wait_for(processes[0], 'TOLD '))
    wait_for(processes[0], 'SERVES')
    asks = [{'prompt': p, 'max_tokens': 6, 'seed': i} for i, p in enumerate(([5, 6, 7], [9], [8]))]
    asks.append({'prompt': [5, 6], 'max_tokens': 0, 'echo': True, 'logprobs': 2})

    def post(ask):
      answer, text = call(port, 'POST', '/v1/completions', ask)
      assert answer.status == 200, text
      return json.loads(text)['choices'][0]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      answers = [*pool.map(post, asks)]
    processes[0].terminate()
    for process in processes:
      wait_for(process, 'ENDED')
      assert process.wait(60) == 0
    return told, answers
  finally:
    for process in processes:
      process.kill()
      process.wait()
      process.stdout.close()


@pytest.mark.slow
def test_two_processes_of_four_devices_give_what_one_gives():
  """Each compiles by itself, on the cores of one."""
  alone, answers_alone = answers_of([(-1, 1)])
  told, answers = answers_of([(0, 4), (1, 4)])
  assert told.pop('devices') == 8 and alone.pop('devices') == 1
  assert told.pop('scores') == pytest.approx(alone.pop('scores'), abs=1e-4)
  assert told == alone
  logs, logs_alone = (a[-1].pop('logprobs') for a in (answers, answers_alone))
  assert logs['tokens'] == logs_alone['tokens']
  assert logs['token_logprobs'] == pytest.approx(logs_alone['token_logprobs'], abs=1e-4)
  assert answers == answers_alone
