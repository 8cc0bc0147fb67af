"""Other people's clients: OpenAI's own, and the harness's model of a server (extra eval)."""

import importlib.util

import pytest

from openmoe.serving.engine import Engine
from tests.inference import case
from tests.serving.test_http import PLAIN, serving

needs_eval = pytest.mark.skipif(
  importlib.util.find_spec('openai') is None or importlib.util.find_spec('lm_eval') is None,
  reason="needs the 'eval' extra",
)


@pytest.fixture(params=['openmoe', 'jetmoe'])
def engine(request):
  engine = Engine(case.model(request.param, max_length=256, chat_template=PLAIN), 4, 8)
  engine.start()
  return engine


@needs_eval
def test_openais_client_talks_streams_and_is_refused(engine):
  import openai

  with serving(engine, api_key='secret') as port:
    client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='secret', max_retries=0)
    assert client.models.list().data[0].id == engine.model.name
    ask = {'model': engine.model.name, 'messages': [{'role': 'user', 'content': 'AB'}]}
    ask |= {'max_tokens': 8, 'temperature': 0}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    (expected,) = engine.model.generate([[5, 6]], 8)[0]
    assert whole.choices[0].message.content == expected.text
    told = [token.logprob for token in whole.choices[0].logprobs.content]
    assert told == pytest.approx(expected.log_probs, abs=1e-5)
    pieces = client.chat.completions.create(**ask, stream=True)
    text = ''.join(piece.choices[0].delta.content or '' for piece in pieces)
    assert text == expected.text
    with pytest.raises(openai.BadRequestError, match='max_tokens=-1 must be a whole number'):
      client.completions.create(model='any', prompt='A', max_tokens=-1)
    with pytest.raises(openai.AuthenticationError):
      client.with_options(api_key='other').models.list()


@needs_eval
def test_the_harness_scores_through_the_server_what_the_model_scores(engine):
  from lm_eval.api.instance import Instance
  from lm_eval.models.openai_completions import LocalCompletionsAPI

  with serving(engine) as port:
    api = LocalCompletionsAPI(
      base_url=f'http://127.0.0.1:{port}/v1/completions',
      model=engine.model.name,
      tokenizer_backend=None,
    )
    # In place of a tokenizer from a folder; the harness only counts and sends its tokens.
    api.tokenizer, api.tokenized_requests = engine.model.vocabulary, True
    api.tok_encode = lambda text, **_: engine.model.vocabulary.encode(text)
    ask = lambda context, rest: Instance('loglikelihood', {}, (context, rest), 0)
    found = api.loglikelihood([ask('ABC', 'DE'), ask('A', 'B')], disable_tqdm=True)
  scores = engine.model.score([((5, 6, 7), (8, 9)), ((5,), (6,))])
  for (log_prob, greedy), score in zip(found, scores, strict=True):
    assert log_prob == pytest.approx(score.log_prob, abs=1e-4)
    assert greedy == score.is_greedy
