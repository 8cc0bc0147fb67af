"""The server over HTTP: OpenAI's forms, streams, refusals, clients that leave, a regular end."""

import concurrent.futures
import contextlib
import http.client
import json
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn

from openmoe.inference.chat import ChatTemplate
from openmoe.inference.decode import decoder
from openmoe.layers.moe.override import watching
from openmoe.models.decoding import init_decode_cache
from openmoe.serving import protocol
from openmoe.serving.app import ServeConfig, Server
from openmoe.serving.engine import Engine
from tests.inference import case


@contextlib.contextmanager
def serving(engine: Engine, **config):
  """The port of a server in this process."""
  listening = socket.create_server(('127.0.0.1', 0))
  app = Server(engine, ServeConfig(**config)).app
  server = uvicorn.Server(uvicorn.Config(app, log_level='warning'))
  thread = threading.Thread(target=server.run, args=([listening],))
  thread.start()
  try:
    yield listening.getsockname()[1]
  finally:
    server.should_exit = True
    thread.join()


PLAIN = ChatTemplate('plain', lambda messages, answer: ''.join(m['content'] for m in messages))


@pytest.fixture(scope='module')
def engine():
  engine = Engine(case.model('openmoe', max_length=256, chat_template=PLAIN), 4, 8)
  engine.start()
  return engine


@pytest.fixture(scope='module')
def port(engine):
  with serving(engine) as port:
    yield port


def call(port, method, path, body=None, headers=()):
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
  content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
  connection.request(method, path, content, dict(headers))
  answer = connection.getresponse()
  text = answer.read().decode()
  connection.close()
  return answer, text


def post(port, path, **body):
  answer, text = call(port, 'POST', f'/v1/{path}', body)
  assert answer.status == 200, text
  return json.loads(text)


def streamed(port, path, **body):
  answer, text = call(port, 'POST', f'/v1/{path}', body | {'stream': True})
  assert answer.status == 200 and answer.headers['content-type'].startswith('text/event-stream')
  lines = [line.removeprefix('data: ') for line in text.split('\n\n') if line]
  assert lines[-1] == '[DONE]'
  return [json.loads(line) for line in lines[:-1]]


def test_completions_have_the_form_and_the_text_of_generation(engine, port):
  model = engine.model
  (one,), (two,) = model.generate([[5, 6, 7], [9]], 6)
  found = post(port, 'completions', prompt=['ABC', [9]], max_tokens=6, temperature=0, model='any')
  assert [c['text'] for c in found['choices']] == [one.text, two.text]
  assert [c['index'] for c in found['choices']] == [0, 1]
  assert found['object'] == 'text_completion' and found['model'] == 'openmoe'
  new = len(one.tokens) + len(two.tokens)
  assert found['usage'] == {
    'prompt_tokens': 4,
    'completion_tokens': new,
    'total_tokens': 4 + new,
  }
  # The token that begins a sequence may be sent along.
  again = post(port, 'completions', prompt=[model.start_id, 9], max_tokens=6, temperature=0)
  assert again['choices'][0]['text'] == two.text


def test_echo_tells_how_probable_a_prompt_is(engine, port):
  (score,) = engine.model.score([((), (5, 6, 7))])
  (found,) = post(
    port, 'completions', prompt='ABC', max_tokens=0, echo=True, logprobs=2, temperature=0
  )['choices']
  told = found['logprobs']
  assert found['text'] == 'ABC' and told['tokens'] == ['A', 'B', 'C']
  assert told['token_logprobs'] == pytest.approx(score.token_log_probs, abs=1e-5)
  assert told['text_offset'] == [0, 1, 2] and all(len(t) == 2 for t in told['top_logprobs'])


def test_a_conversation_streams_what_it_answers_at_once(engine, port):
  body = {'messages': [{'role': 'user', 'content': 'AB'}], 'max_tokens': 9, 'temperature': 0.7}
  body |= {'seed': 3, 'logprobs': True, 'top_logprobs': 2, 'n': 2}
  found = post(port, 'chat/completions', **body)
  assert found['object'] == 'chat.completion' and len(found['choices']) == 2
  pieces = streamed(port, 'chat/completions', **body, stream_options={'include_usage': True})
  assert pieces[-1]['usage'] == found['usage'] and pieces[-1]['choices'] == []
  for index, choice in enumerate(found['choices']):
    own = [p['choices'][0] for p in pieces[:-1] if p['choices'][0]['index'] == index]
    assert own[0]['delta']['role'] == choice['message']['role'] == 'assistant'
    assert ''.join(p['delta']['content'] for p in own) == choice['message']['content']
    assert [p['finish_reason'] for p in own] == [None] * (len(own) - 1) + [choice['finish_reason']]
    told = [t for p in own for t in p['logprobs']['content']]
    assert told == choice['logprobs']['content']
    assert all(len(t['top_logprobs']) == 2 for t in told)
  assert found['choices'][0]['message'] != found['choices'][1]['message']


def test_the_experts_of_new_tokens_are_told_on_request(engine, port):
  body = {'prompt': 'ABC', 'max_tokens': 5, 'temperature': 0, 'experts': True}
  (found,) = post(port, 'completions', **body)['choices']
  pieces = streamed(port, 'completions', **body)
  told = [e for piece in pieces for e in piece['choices'][0]['experts']]
  new = [token for (g,) in engine.model.generate([[5, 6, 7]], 5) for token in g.tokens]
  assert told == found['experts'] and len(told) >= len(new)
  routers = json.loads(call(port, 'GET', '/health')[1])['routers']
  assert routers == ['mlp.1'] and all(len(e) == len(routers) for e in told)
  # What the routers say of the same places in one pass over all.
  with watching() as seen:
    row = np.array([[0, 5, 6, 7, *new]], np.int32)
    config, places = engine.model.config, np.arange(row.size)
    cache = init_decode_cache(config, 1, row.size)
    where = (places[None], (places <= places[:, None])[None], cache, 0)
    variables = {'params': engine.model.params}
    decoder(config, row.size).apply(variables, row, *where, method='decode')
  expected = seen[0].routing.expert_index_gtk.reshape(row.size, -1)[3 : 3 + len(told)]
  assert [sorted(e[0]) for e in told] == np.sort(expected).tolist()
  assert 'experts' not in post(port, 'completions', prompt='A', max_tokens=1)['choices'][0]


def test_many_clients_at_once_get_what_they_get_alone(port):
  asks = [{'prompt': chr(70 + i) * (i + 1), 'max_tokens': 12, 'seed': i} for i in range(10)]
  alone = [post(port, 'completions', **ask)['choices'] for ask in asks]
  with concurrent.futures.ThreadPoolExecutor(10) as pool:
    together = [*pool.map(lambda ask: post(port, 'completions', **ask)['choices'], asks)]
  assert together == alone


def test_a_client_that_leaves_frees_its_slot(engine, port):
  cancelled = engine.counts.cancelled
  for stream in (False, True):
    body = json.dumps({'prompt': 'A', 'max_tokens': 200, 'stream': stream, 'stop': '\0'})
    with socket.create_connection(('127.0.0.1', port)) as client:
      head = f'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n'
      client.sendall((head + body).encode())
      while not engine.load()['answering']:
        time.sleep(0.001)
  until = time.monotonic() + 60
  while engine.load() != {'waiting': 0, 'reading': 0, 'answering': 0}:
    assert time.monotonic() < until
    time.sleep(0.01)
  assert engine.counts.cancelled > cancelled


def test_a_full_queue_is_429_and_says_when_to_come_again(port):
  body = {'prompt': ['A'] * 13, 'max_tokens': 4}
  answer, text = call(port, 'POST', '/v1/completions', body)
  assert answer.status == 429 and int(answer.headers['retry-after']) >= 1
  assert json.loads(text)['error']['type'] == 'overloaded_error'


@pytest.mark.parametrize(
  ('path', 'body', 'message'),
  [
    ('completions', [1], 'The body holds a list; an object belongs there'),
    ('completions', b'{"a":', 'The body is no JSON'),
    ('completions', b'[' * 5000, 'The body is no JSON: nested too deeply'),
    ('completions', b'{"prompt": "\\ud800"}', 'is no valid text'),
    ('completions', {}, 'prompt=None must be a text, token ids'),
    ('completions', {'prompt': []}, 'prompt has 0 entries'),
    ('completions', {'prompt': ['A', 3.5]}, 'prompt=3.5 must be'),
    ('completions', {'prompt': [9999]}, 'The prompt has the token 9999'),
    ('completions', {'prompt': 'A' * 300}, 'takes at most 254 of max_length=256'),
    ('completions', {'prompt': 'A', 'max_tokens': 0}, 'max_tokens=0 must be a whole number from 1'),
    ('completions', {'prompt': 'A', 'n': 0}, 'n=0 must be a whole number from 1 to 16'),
    ('completions', {'prompt': 'A', 'n': True}, 'n=True must be a whole number'),
    ('completions', {'prompt': 'A', 'temperature': 'hot'}, "temperature='hot' must be"),
    ('completions', b'{"prompt": "A", "temperature": NaN}', 'temperature=nan must be'),
    ('completions', {'prompt': 'A', 'top_p': 0}, 'top_p=0 must be'),
    ('completions', {'prompt': 'A', 'stop': ['']}, 'stop='),
    ('completions', {'prompt': 'A', 'logprobs': 21}, 'logprobs=21 must be'),
    ('completions', {'prompt': 'A', 'logit_bias': {'5': 1}}, 'logit_bias=.* is not implemented'),
    ('completions', {'prompt': 'A', 'checkpoint': '/etc'}, 'checkpoint is not known here'),
    ('chat/completions', {}, 'messages is missing'),
    ('chat/completions', {'messages': [{'role': 'x', 'content': 'A'}]}, "Roles \\['x'\\]"),
    ('chat/completions', {'messages': [{'role': 'user'}]}, r'messages\[0\].content must be'),
    ('chat/completions', {'messages': ['A']}, r'messages\[0\] must be'),
    (
      'chat/completions',
      {'messages': [{'role': 'user', 'content': 'A'}], 'top_logprobs': 2},
      'top_logprobs=2 wants logprobs=true',
    ),
  ],
)
def test_what_is_wrong_is_400_with_value_and_rule(port, path, body, message):
  answer, text = call(port, 'POST', f'/v1/{path}', body)
  assert answer.status == 400
  with pytest.raises(ValueError, match=message):
    raise ValueError(json.loads(text)['error']['message'])


def test_bodies_have_a_size_and_models_a_name(port):
  answer, text = call(port, 'POST', '/v1/completions', b'{"prompt": "' + b'A' * (5 << 20) + b'"}')
  assert answer.status == 413 and 'more than 4194304 bytes' in text
  assert json.loads(call(port, 'GET', '/v1/models')[1])['data'][0]['id'] == 'openmoe'
  assert call(port, 'GET', '/v1/models/openmoe')[0].status == 200
  assert call(port, 'GET', '/v1/models/other')[0].status == 404
  assert call(port, 'GET', '/v1/../etc/passwd')[0].status == 404


def test_health_metrics_and_the_page_are_there(engine, port):
  post(port, 'completions', prompt='A', max_tokens=2)
  answer, text = call(port, 'GET', '/health')
  facts = json.loads(text)
  assert answer.status == 200 and facts['status'] == 'ok' and facts['slots'] == 4
  assert facts['cache_bytes'] == 2 * 4 * 4 * (256 + 256) * 4 * 4 * 2
  answer, text = call(port, 'GET', '/metrics')
  values = dict(line.split() for line in text.splitlines() if not line.startswith('#'))
  assert int(values['openmoe_new_tokens_total']) == engine.counts.new_tokens > 0
  assert values['openmoe_sequences_waiting'] == '0'
  answer, text = call(port, 'GET', '/')
  assert "default-src 'none'" in answer.headers['content-security-policy']
  assert '<title>OpenMoE</title>' in text and 'http://' not in text and 'https://' not in text


def test_a_key_is_asked_for_and_an_end_answers_what_is_under_way():
  engine = Engine(case.model('openmoe', max_length=256), 4, 8)
  engine.start()
  key = {'Authorization': 'Bearer secret'}
  body = {'prompt': 'A', 'max_tokens': 100, 'temperature': 0}
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    with serving(engine, api_key='secret') as port:
      for headers in ({}, {'Authorization': 'Bearer other'}):
        answer, text = call(port, 'GET', '/v1/models', headers=headers)
        assert answer.status == 401 and 'API key is missing or wrong' in text
      assert call(port, 'GET', '/v1/models', headers=key)[0].status == 200
      assert call(port, 'GET', '/health')[0].status == 200
      under_way = pool.submit(call, port, 'POST', '/v1/completions', body, key)
      while not engine.load()['answering']:
        assert not under_way.done()
        time.sleep(0.001)
    # Leaving the block told the server to end, in the middle of the answer.
    answer, text = under_way.result()
  assert answer.status == 200 and json.loads(text)['choices'][0]['finish_reason']
  assert not engine._thread.is_alive()


def test_offsets_of_pieces_count_characters():
  model = case.model('openmoe')
  tokens = [protocol.Token(5, -1.0), protocol.Token(6, -2.0, ((6, -2.0),))]
  assert protocol._logprobs(tokens, model) == {
    'tokens': ['A', 'B'],
    'token_logprobs': [-1.0, -2.0],
    'top_logprobs': [{}, {'B': -2.0}],
    'text_offset': [0, 1],
  }
