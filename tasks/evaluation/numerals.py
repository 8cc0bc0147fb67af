"""Numbers as people and models write them, compared by value.

72, 72.0, $72.00, 72 %, +72 and 144/2 are one number; so are -5 and −5, 1,000 and 1 000 (with a
no-break space), .5 and 1/2. A sign counts where it can be one: 10-5 ends in 5, not in -5.
"""

from __future__ import annotations

import fractions
import re
import unicodedata

_LONGEST = 310  # characters; what is longer is no answer, and slow to compute with
_DIGITS = r'[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+'
_FRACTION = r'(?:(?P<whole>[0-9]{1,9}) )?(?P<over>[0-9]+)/(?P<under>[0-9]+)(?![0-9/]|\.[0-9])'


def _pattern(digits: str) -> re.Pattern[str]:
  decimal = rf'(?:{digits})(?:\.[0-9]*)?|(?<![\w)])\.[0-9]+'
  return re.compile(
    rf'(?:(?<![\w)\]%.])(?P<sign>[-+]))?(?:[$€£¥] ?(?P<inner>[-+])?)?'
    rf'(?:(?<![0-9/]){_FRACTION}|(?P<decimal>{decimal})(?P<power>[eE][-+]?[0-9]{{1,2}}(?![0-9]))?)'
  )


_NUMBER = _pattern(_DIGITS)
# Behind a mark the number ends where the commas do, wherever they stand.
_MARKED = _pattern(r'[0-9]+(?:,[0-9]+)*')
_MARK = re.compile(r'####[ \t]*(?:\*\*|\$(?=boxed)|boxed\{)*')


def _plain(text: str) -> str:
  """With one spelling of signs, separators, fractions and digits."""
  text = re.sub(r'(?<=[0-9])(?:[\u00a0\u2009\u202f\'’]|\{,\})(?=[0-9]{3}(?![0-9]))', ',', text)
  text = re.sub(r'\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}', r' \1/\2', text)
  text = re.sub(r'([\u00bc-\u00be\u2150-\u215e])', r' \1', text)
  text = unicodedata.normalize('NFKC', text).replace('\u2044', '/').replace('\\', '')
  return re.sub(r'[\u2010-\u2013\u2212](?=[$€£¥]? ?[0-9.])', '-', text)


def _value(found: re.Match[str]) -> fractions.Fraction | None:
  if len(found.group()) > _LONGEST:
    return None
  part = found.groupdict()
  if part['over']:
    over, under = int(part['over']), int(part['under'])
    if not under:
      return None
    value = fractions.Fraction(over, under)
    if part['whole'] and over < under:
      value += int(part['whole'])
  else:
    value = fractions.Fraction(part['decimal'].replace(',', '').removesuffix('.'))
    value *= fractions.Fraction(10) ** int((part['power'] or 'e0')[1:])
  minus = (part['sign'] == '-') != (part['inner'] == '-')
  return -value if minus else value


def spell(value: fractions.Fraction) -> str:
  """The shortest decimal spelling, or over/under where there is none: equal text, equal value."""
  rest, digits = value.denominator, 0
  for factor in (2, 5):
    count = 0
    while rest % factor == 0:
      rest, count = rest // factor, count + 1
    digits = max(digits, count)
  if rest > 1:
    return f'{value.numerator}/{value.denominator}'
  if not digits:
    return str(value.numerator)
  scaled = str(abs(value.numerator) * 10**digits // value.denominator).rjust(digits + 1, '0')
  return f'{"-" if value < 0 else ""}{scaled[:-digits]}.{scaled[-digits:]}'


def _spelt(found: re.Match[str] | None) -> str | None:
  value = _value(found) if found else None
  return None if value is None else spell(value)


def read_number(text: str, strict: bool) -> str | None:
  """The answer of a solution: what follows '####', or (not strict) else the last number.

  Returns:
    Its one spelling, None where there is no number.
  """
  plain = _plain(text)
  for mark in _MARK.finditer(plain):
    found = _MARKED.match(plain, mark.end())
    if found:
      return _spelt(found)
  if strict:
    return None
  return _spelt(next(reversed(list(_NUMBER.finditer(plain))), None))


def read_reference(text: str) -> str | None:
  """The number of a reference: what follows '####', or the whole text if it is a number."""
  marked = read_number(text, strict=True)
  if marked is not None:
    return marked
  plain = _plain(text).strip()
  found = _NUMBER.match(plain)
  return _spelt(found) if found and plain[found.end() :].strip() in ('', '%', '.') else None
