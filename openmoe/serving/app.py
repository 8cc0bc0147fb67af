"""The HTTP side of the server, as an ASGI application: OpenAI's interface, health, metrics, a page.

A request can name no file and no code: it is JSON of bounded size, whose fields protocol.py reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import (
  HTMLResponse,
  JSONResponse,
  PlainTextResponse,
  Response,
  StreamingResponse,
)
from starlette.routing import Route

from openmoe.checkpoint import safe_json
from openmoe.checkpoint.paths import Unreadable
from openmoe.config import ConfigError
from openmoe.inference.routing import router_names
from openmoe.serving import protocol
from openmoe.serving.engine import Engine
from openmoe.serving.page import PAGE
from openmoe.serving.request import Event, Overloaded, Work
from openmoe.serving.slots import cache_bytes


@dataclasses.dataclass(frozen=True)
class ServeConfig:
  """How a server behaves.

  Attributes:
    api_key: what clients must send; empty for none.
    timeout: seconds that an answer may take.
    max_body: bytes of a request.
  """

  api_key: str = ''
  timeout: float = 600.0
  max_body: int = 4 << 20

  def __post_init__(self):
    if not 0 < self.timeout < float('inf') or self.max_body < 1:
      raise ConfigError(f'timeout={self.timeout} and max_body={self.max_body} must be above 0.')


class Refused(Exception):
  """A request that is answered with an error.

  Attributes:
    status: of HTTP.
  """

  def __init__(self, status: int, message: str, kind: str = 'invalid_request_error', **headers):
    super().__init__(message)
    self.status, self.kind, self.headers = status, kind, headers


class _Answers:
  """The sequences of one request on their way, seen from the event loop."""

  def __init__(self, engine: Engine, request: protocol.Request):
    self.request = request
    self.queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    tell = lambda i: lambda event: _from_thread(loop, self.queue, (i, event))
    self.works: list[Work] = engine.submit(request.asks, [*map(tell, range(len(request.asks)))])

  async def events(self) -> AsyncIterator[tuple[int, Event]]:
    """(choice, piece) until all have ended; whoever leaves early ends them."""
    left = len(self.works)
    try:
      while left:
        index, event = await self.queue.get()
        left -= event.finish is not None
        yield index, event
    finally:
      for work in self.works:
        work.cancel()


def _from_thread(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, item) -> None:
  # The loop may be gone when a server ends in the middle of an answer.
  with contextlib.suppress(RuntimeError):
    loop.call_soon_threadsafe(queue.put_nowait, item)


class Server:
  """Answers of an engine over HTTP; `app` is the ASGI application."""

  def __init__(self, engine: Engine, config: ServeConfig = ServeConfig()):
    self.engine, self.config = engine, config
    self._created = int(time.time())
    routes = [
      Route('/', self._page),
      Route('/health', self._health),
      Route('/metrics', self._guarded(self._metrics)),
      Route('/v1/models', self._guarded(self._models)),
      Route('/v1/models/{name:path}', self._guarded(self._model)),
      Route('/v1/completions', self._guarded(self._complete), methods=['POST']),
      Route('/v1/chat/completions', self._guarded(self._chat), methods=['POST']),
    ]
    self.app = Starlette(routes=routes, lifespan=self._lifespan)

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    del app
    try:
      yield
    finally:
      await asyncio.to_thread(self.engine.stop)

  def _guarded(self, answer: Callable[[HttpRequest], Awaitable[Response]]):
    """Checks the key, and turns what was refused into an answer."""

    async def one(http: HttpRequest) -> Response:
      try:
        self._check_key(http)
        return await answer(http)
      except Refused as refused:
        body = protocol.error(str(refused), refused.kind)
        return JSONResponse(body, refused.status, headers=refused.headers)

    return one

  def _check_key(self, http: HttpRequest) -> None:
    if self.config.api_key:
      given = http.headers.get('authorization', '').removeprefix('Bearer ').encode()
      if not hmac.compare_digest(given, self.config.api_key.encode()):
        raise Refused(401, 'The API key is missing or wrong; send Authorization: Bearer KEY.')

  # --- what is there

  async def _page(self, http: HttpRequest) -> Response:
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    return HTMLResponse(PAGE, headers={'Content-Security-Policy': policy + "connect-src 'self'"})

  async def _health(self, http: HttpRequest) -> Response:
    engine, model = self.engine, self.engine.model
    facts = {
      'status': 'failed' if engine.broken else 'ok',
      'model': model.name,
      'max_length': model.max_length,
      'slots': engine.slots,
      'cache_bytes': cache_bytes(model.config, engine.slots, model.max_length),
      'routers': router_names(model.config) if model.config.moe else [],
      'weights': model.weights,
      'promise': 'an answer does not depend on other requests (no token is dropped)',
      **engine.load(),
    }
    return JSONResponse(facts, 503 if engine.broken else 200)

  async def _metrics(self, http: HttpRequest) -> Response:
    lines = []
    for name, value in dataclasses.asdict(self.engine.counts).items():
      lines += [f'# TYPE openmoe_{name}_total counter', f'openmoe_{name}_total {value}']
    for name, value in self.engine.load().items():
      lines += [f'# TYPE openmoe_sequences_{name} gauge', f'openmoe_sequences_{name} {value}']
    return PlainTextResponse('\n'.join(lines) + '\n', media_type='text/plain; version=0.0.4')

  def _card(self) -> dict[str, Any]:
    name = self.engine.model.name
    return {'id': name, 'object': 'model', 'created': self._created, 'owned_by': 'openmoe'}

  async def _models(self, http: HttpRequest) -> Response:
    return JSONResponse({'object': 'list', 'data': [self._card()]})

  async def _model(self, http: HttpRequest) -> Response:
    name = http.path_params['name']
    if name != self.engine.model.name:
      raise Refused(404, f'There is no model {name!r:.80}; {self.engine.model.name} is served.')
    return JSONResponse(self._card())

  # --- answers

  async def _complete(self, http: HttpRequest) -> Response:
    return await self._answer(http, chat=False)

  async def _chat(self, http: HttpRequest) -> Response:
    return await self._answer(http, chat=True)

  async def _answer(self, http: HttpRequest, chat: bool) -> Response:
    body = await self._json(http)
    try:
      # Templates and tokenizers take their time.
      request = await asyncio.to_thread(
        protocol.read, body, self.engine.model, chat, self.config.timeout
      )
      answers = _Answers(self.engine, request)
    except ConfigError as error:
      raise Refused(400, str(error)) from error
    except Overloaded as error:
      wait = {'Retry-After': str(error.retry_after)}
      raise Refused(429, str(error), 'overloaded_error', **wait) from error
    number, created = secrets.token_hex(12), int(time.time())
    if request.stream:
      stream = self._stream(answers, number, created)
      return StreamingResponse(stream, media_type='text/event-stream')
    return await self._all(http, answers, number, created)

  async def _json(self, http: HttpRequest) -> Any:
    most, parts, size = self.config.max_body, [], 0
    async for part in http.stream():
      size += len(part)
      if size > most:
        raise Refused(413, f'The body has more than {most} bytes.')
      parts.append(part)
    try:
      return safe_json.parse(b''.join(parts), 'The body')
    except Unreadable as error:
      raise Refused(400, str(error)) from error

  async def _all(self, http, answers: _Answers, number: str, created: int) -> Response:
    """One JSON object when everything has ended; a client that leaves ends it."""
    found: list[list[Event]] = [[] for _ in answers.works]

    async def gather() -> None:
      async for index, event in answers.events():
        found[index].append(event)

    work = asyncio.create_task(gather())
    watch = asyncio.create_task(_left(http))
    await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
    for task in (work, watch):
      if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
          await task
    if work.cancelled():
      return Response(status_code=499)
    ends = [protocol.whole(events) for events in found]
    if wrong := [end for end in ends if end.error]:
      late = wrong[0].finish == 'time'
      raise Refused(408 if late else 500, wrong[0].error, 'timeout' if late else 'server_error')
    request, model = answers.request, self.engine.model
    one = lambda i, end: protocol.choice(request, i, end, model, streams=False, first=True)
    result = protocol.head(request, model.name, number, created, streams=False) | {
      'choices': [one(i, end) for i, end in enumerate(ends)],
      'usage': protocol.usage(request, [work.new for work in answers.works]),
    }
    return JSONResponse(result)

  async def _stream(self, answers: _Answers, number: str, created: int) -> AsyncIterator[bytes]:
    """Server-sent events: a JSON object a piece, then [DONE]."""
    request, model = answers.request, self.engine.model
    top = protocol.head(request, model.name, number, created, streams=True)
    told: set[int] = set()
    async with contextlib.aclosing(answers.events()) as events:
      async for index, event in events:
        if event.error:
          yield _sse(protocol.error(event.error, 'server_error'))
          return
        first = index not in told
        told.add(index)
        one = protocol.choice(request, index, event, model, streams=True, first=first)
        yield _sse(top | {'choices': [one]})
    if request.usage:
      counts = protocol.usage(request, [work.new for work in answers.works])
      yield _sse(top | {'choices': [], 'usage': counts})
    yield b'data: [DONE]\n\n'


async def _left(http: HttpRequest) -> None:
  """Returns when the client is gone."""
  while not await http.is_disconnected():
    await asyncio.sleep(0.1)


def _sse(value: Any) -> bytes:
  return f'data: {json.dumps(value)}\n\n'.encode()
