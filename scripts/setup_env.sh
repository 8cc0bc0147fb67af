#!/usr/bin/env bash
# Makes or updates the project's virtual environment; a no-op in well under 2 s when it is current.
#
#   bash scripts/setup_env.sh [EXTRA...]      extras of pyproject.toml: tpu cuda torch cache eval
#
# OPENMOE_VENV   where the environment lives (default: .venv in the repository)
# PYTHON         the interpreter to build it from (default: the first 3.11 or newer found)
#
# Extras are kept: once asked for, they stay until the environment is deleted. The stamp file is
# written last, so an installation that was interrupted is rebuilt from nothing, never trusted.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${OPENMOE_VENV:-$ROOT/.venv}"
STAMP="$VENV/openmoe-environment"
LOCK="$VENV/openmoe-lock"

say() { printf '[setup_env] %s\n' "$*" >&2; }
die() {
  printf '[setup_env] error: %s\n' "$*" >&2
  exit 1
}

is_new_enough() { # a command name; pyenv's shims exist without working, so it has to be run
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a working Python 3.11 or newer."
    printf '%s' "$PYTHON"
    return
  fi
  # The versions that requirements.txt is tested with come before whatever else there is.
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if is_new_enough "$candidate"; then
      printf '%s' "$candidate"
      return
    fi
  done
  local found
  found="$(python3 --version 2>&1 || true)"
  die "no Python 3.11 or newer on the PATH (python3 says: ${found:-nothing}). Install one, or set" \
    "PYTHON=/path/to/python3.11; with uv installed, 'uv python install 3.11' does it."
}

dependencies() { # what the installation depends on: the pins, and the extras of pyproject.toml
  cat "$ROOT/requirements.txt"
  sed -n '/^\[project.optional-dependencies\]/,/^\[tool/p' "$ROOT/pyproject.toml"
}

digest() {
  if command -v sha256sum >/dev/null; then
    dependencies | sha256sum | cut -d' ' -f1
  else
    dependencies | shasum -a 256 | cut -d' ' -f1
  fi
}

stamp_field() { sed -n "s/^$1=//p" "$STAMP" 2>/dev/null || true; }

# Prints the requirements to install: requirements.txt, then the extras' own. A pin of an extra
# replaces the one of requirements.txt (cache needs an older protobuf, for example).
requirements() {
  "$VENV/bin/python" - "$ROOT" "$@" <<'PY'
import pathlib
import re
import sys
import tomllib

root, extras = pathlib.Path(sys.argv[1]), sys.argv[2:]
project = tomllib.loads((root / 'pyproject.toml').read_text())['project']
optional = project['optional-dependencies']


def name(requirement: str) -> str:
  return re.split(r'[\[<>=~! ;]', requirement)[0].lower().replace('_', '-')


added = [r for extra in extras for r in optional[extra]]
# An extra such as jax[tpu] adds to the base pin, so only plain names replace it.
replaced = {name(r) for r in added if '[' not in r}
for line in (root / 'requirements.txt').read_text().splitlines():
  if line and not line.startswith('#') and name(line) not in replaced:
    print(line)
print('\n'.join(added))
PY
}

is_current() { # every extra in "$@" is there, and nothing that matters has changed
  [[ -f "$STAMP" && -x "$VENV/bin/python" ]] || return 1
  [[ "$(stamp_field digest)" == "$(digest)" ]] || return 1
  [[ "$(stamp_field python)" == "$("$VENV/bin/python" -V 2>&1)" ]] || return 1
  local extra have
  have=" $(stamp_field extras) "
  for extra in "$@"; do
    [[ "$have" == *" $extra "* ]] || return 1
  done
}

make_venv() { # an empty environment in $VENV, keeping only the lock
  find "$VENV" -mindepth 1 -maxdepth 1 ! -name openmoe-lock -exec rm -rf {} +
  if command -v uv >/dev/null; then
    local python
    python="$(find_python 2>/dev/null || printf '3.11')" # uv fetches a 3.11 when there is none
    uv venv --quiet --allow-existing --python "$python" "$VENV"
  else
    local python
    python="$(find_python)"
    "$python" -m venv "$VENV" || die "'$python -m venv' failed; on Debian: apt install python3-venv."
  fi
}

install() {
  local list status=0
  list="$(mktemp)"
  requirements "$@" >"$list" || {
    rm -f "$list"
    exit 1
  }
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$VENV/bin/python" -r "$list" || status=$?
  else
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$list" || status=$?
  fi
  rm -f "$list"
  [[ $status == 0 ]] || die "the installation failed (see above); nothing was marked as complete."
}

check_names() { # before anything is touched
  local extra
  for extra in "$@"; do
    if [[ ! "$extra" =~ ^[a-z]+$ ]] || ! grep -q "^$extra = \[" "$ROOT/pyproject.toml"; then
      die "no extra named '$extra'; there are: tpu cuda torch cache eval."
    fi
  done
}

main() {
  local extras digest_before
  check_names "$@"
  if is_current "$@"; then
    return
  fi
  if [[ -e "$VENV" && ! -e "$LOCK" && -n "$(ls -A "$VENV")" ]]; then
    die "$VENV was not made by this script and would be overwritten. Remove it, or set" \
      "OPENMOE_VENV to another place."
  fi
  mkdir -p "$VENV"
  exec 9>"$LOCK"
  # Two runs started together must not install into one place.
  if command -v flock >/dev/null; then flock 9; fi
  if is_current "$@"; then
    return
  fi
  extras="$(printf '%s\n' "$(stamp_field extras)" "$@" | tr ' ' '\n' | sort -u | xargs)"
  digest_before="$(digest)"
  say "installing into $VENV${extras:+ with extras: $extras} (about 3 GB; one to three minutes)"
  if [[ -f "$STAMP" && "$(stamp_field python)" == "$("$VENV/bin/python" -V 2>&1)" ]]; then
    rm "$STAMP" # complete, only out of date: packages are replaced in place
  else
    make_venv
  fi
  # shellcheck disable=SC2086  # a list of words
  install $extras
  printf 'digest=%s\npython=%s\nextras=%s\n' \
    "$digest_before" "$("$VENV/bin/python" -V 2>&1)" "$extras" >"$STAMP.partial"
  mv "$STAMP.partial" "$STAMP"
  say "ready: $VENV/bin/python"
}

main "$@"
