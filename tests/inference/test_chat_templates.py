"""Chat templates as folders have them: published habits, damaged files, hostile ones."""

from __future__ import annotations

import json

import pytest

from openmoe.config import ConfigError
from openmoe.inference import chat, template

HELLO = [{'role': 'user', 'content': 'hi'}]


def folder(tmp_path, source=None, config=None):
  if source is not None:
    (tmp_path / 'chat_template.jinja').write_text(source, encoding='utf-8')
  if config is not None:
    (tmp_path / 'tokenizer_config.json').write_text(config, encoding='utf-8')
  return tmp_path


@pytest.mark.parametrize(
  ('source', 'text'),
  [
    ('{% for m in messages %}[{{ m.role }}] {{ m["content"] }}{% endfor %}', '[user] hi'),
    ('{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}', 'hi'),
    ('{% for m in messages %}{{ m.content }}{% break %}{% endfor %}', 'hi'),
    ('{{ messages[0] | tojson }}', '{"role": "user", "content": "hi"}'),
    ('{{ bos_token }}é{{ eos_token }}', 'é</s>'),
    ('{{ strftime_now("%%") }}', '%'),
    ('{% if add_generation_prompt %}go{% endif %}', 'go'),
  ],
)
def test_what_transformers_gives_to_templates(tmp_path, source, text):
  config = json.dumps({'bos_token': '<s>', 'eos_token': {'content': '</s>'}})
  assert chat.from_folder(folder(tmp_path, source, config)).text(HELLO) == text


def test_several_templates_by_name_and_none_at_all(tmp_path):
  named = [{'name': 'tool', 'template': 'x'}, {'name': 'default', 'template': 'd'}]
  config = json.dumps({'chat_template': named})
  assert chat.from_folder(folder(tmp_path, config=config)).text(HELLO) == 'd'
  assert (
    chat.from_folder(folder(tmp_path, config='{"chat_template": [{"name": "default"}]}')) is None
  )


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('{% if %}', 'TemplateSyntaxError'),
    ("{{ raise_exception('System role not supported') }}", 'System role not supported'),
    ('{{ messages[7].content.x }}', 'UndefinedError'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
    ("{{ 'x'.center(3000000000) }}", 'more memory'),
  ],
)
def test_a_template_that_fails_says_so_and_the_next_one_works(tmp_path, source, message):
  found = chat.from_folder(folder(tmp_path, source))  # not compiled yet
  for _ in range(2):
    with pytest.raises(ConfigError, match=message):
      found.text(HELLO)


def test_a_template_that_never_ends_is_ended(tmp_path, monkeypatch):
  monkeypatch.setattr(template, 'SECONDS', 1.5)
  loop = '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'
  with pytest.raises(ConfigError, match='not done after'):
    chat.from_folder(folder(tmp_path, loop)).text(HELLO)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ('', 'tokenizer_config.json cannot be read'),
    ('[]', 'tokenizer_config.json cannot be read'),
    ('{"eos_token": 5}', 'eos_token=5 is no text'),
    ('{"a": ' + '[' * 5000, 'tokenizer_config.json cannot be read'),
  ],
)
def test_a_damaged_tokenizer_config_is_named(tmp_path, config, message):
  with pytest.raises(ConfigError, match=message):
    chat.from_folder(folder(tmp_path, config=config))
