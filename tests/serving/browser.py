"""A headless Chromium, spoken to by WebDriver's HTTP, where the system has one."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

_ELEMENT = 'element-6066-11e4-a52e-4f735466cecf'


def is_there() -> bool:
  return all(map(shutil.which, ('chromedriver', 'chromium')))


class Browser:
  """One window.

  Args:
    url: of the WebDriver session.
  """

  def __init__(self, url: str):
    self._url = url

  def _do(self, path: str, body=None, method='POST'):
    return _call(f'{self._url}/{path}', body, method)

  def open(self, url: str) -> None:
    self._do('url', {'url': url})

  def type(self, selector: str, text: str) -> None:
    self._do(f'element/{self._element(selector)}/value', {'text': text})

  def click(self, selector: str) -> None:
    self._do(f'element/{self._element(selector)}/click', {})

  def _element(self, selector: str) -> str:
    return self._do('element', {'using': 'css selector', 'value': selector})[_ELEMENT]

  def run(self, script: str):
    """What a script returns."""
    return self._do('execute/sync', {'script': script, 'args': []})

  def wait_for(self, script: str, seconds: float = 60):
    """What a script returns when it is true at last."""
    until = time.monotonic() + seconds
    while not (found := self.run(script)):
      assert time.monotonic() < until, f'{script} did not become true'
      time.sleep(0.05)
    return found

  def picture(self) -> bytes:
    """PNG of the window."""
    return base64.b64decode(self._do('screenshot', None, 'GET'))


def _call(url: str, body=None, method: str = 'POST'):
  content = None if body is None else json.dumps(body).encode()
  request = urllib.request.Request(
    url, content, {'Content-Type': 'application/json'}, method=method
  )
  with urllib.request.urlopen(request, timeout=120) as answer:
    return json.load(answer)['value']


@contextlib.contextmanager
def browser(*arguments: str):
  """A window, closed at the end."""
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  command = [shutil.which('chromedriver'), f'--port={port}']
  driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  url = f'http://127.0.0.1:{port}'
  try:
    _started(url)
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--window-size=900,700', *arguments]
    wanted = {'browserName': 'chrome', 'goog:chromeOptions': {'args': options}}
    session = _call(f'{url}/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']
    yield Browser(f'{url}/session/{session}')
    _call(f'{url}/session/{session}', None, 'DELETE')
  finally:
    driver.terminate()
    driver.wait()


def _started(url: str) -> None:
  for _ in range(200):
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
      if _call(f'{url}/status', None, 'GET')['ready']:
        return
    time.sleep(0.1)
  raise TimeoutError('chromedriver did not start.')
