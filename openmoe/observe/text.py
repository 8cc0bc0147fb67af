"""Text from files as a terminal may see it."""

from __future__ import annotations

import unicodedata

# Controls, formats (direction marks among them), halves of surrogate pairs, private, line ends.
_HIDDEN = ('Cc', 'Cf', 'Cs', 'Co', 'Zl', 'Zp')


def visible(text: str, keep: str = '\n\t\u200c\u200d') -> str:
  r"""The text with everything that a terminal would obey written out as in repr().

  Args:
    keep: characters to leave as they are; the joiners of emoji and of Persian do no harm.

  >>> visible('a\x1b[2Jb\rc')
  'a\\x1b[2Jb\\rc'
  """
  hidden = lambda c: c not in keep and unicodedata.category(c) in _HIDDEN
  return ''.join(ascii(c)[1:-1] if hidden(c) else c for c in text)
