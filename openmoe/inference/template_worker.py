"""The program that template.py starts: a line of JSON in, a line of JSON out.

It runs by its path and imports nothing of the project.
"""

import datetime
import json
import resource
import sys

MEMORY = 1 << 30  # bytes of address space
SECONDS = 20  # of processor time for all conversations before it is started anew


class Refused(Exception):
  """The template's own sentence."""


def _raise_exception(message):
  raise Refused(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def environment():
  """What transformers gives to templates, without reach beyond the messages."""
  import jinja2.ext
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  class Generation(jinja2.ext.Extension):
    """{% generation %}: marks what the assistant wrote; the text is the same."""

    tags = frozenset({'generation'})

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      return jinja2.nodes.Scope(body).set_lineno(line)

  made = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  made.filters['tojson'] = _tojson
  made.globals['raise_exception'] = _raise_exception
  made.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return made


def answer(line):
  """{'text': ...} or {'error': ...} of one request."""
  request = json.loads(line)
  try:
    template = environment().from_string(request['source'])
    return {'text': template.render(**request['values'])}
  except ImportError:
    return {'error': 'jinja2 is not installed; `bash scripts/setup_env.sh` does it.'}
  except Refused as error:
    return {'error': f'{error} (the template says so).'}
  except MemoryError:
    return {'error': 'it took more memory than a text can need; give another template.'}
  # Whatever a template of somebody else runs into is told, by name.
  except Exception as error:  # noqa: BLE001
    return {'error': f'{type(error).__name__}: {error}. Repair chat_template.jinja.'}


def main():
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  for line in sys.stdin.buffer:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    sys.stdout.write(json.dumps(answer(line)) + '\n')
    sys.stdout.flush()


if __name__ == '__main__':
  main()
