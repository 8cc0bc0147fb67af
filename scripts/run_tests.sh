#!/usr/bin/env bash
# Sets up the environment, then checks style and runs the tests.
#
#   bash scripts/run_tests.sh                      everything but the tests marked slow
#   bash scripts/run_tests.sh -m slow              only those
#   bash scripts/run_tests.sh tests/test_config.py -k capacity      any pytest arguments
#
# OPENMOE_VENV           where the environment lives (default: .venv)
# OPENMOE_TEST_WORKERS   processes that share the tests (default: cores, at most 4; 0 for none)
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
bash scripts/setup_env.sh
BIN="${OPENMOE_VENV:-$ROOT/.venv}/bin"

export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0

cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
workers="${OPENMOE_TEST_WORKERS:-$((cores < 4 ? cores : 4))}"

"$BIN/ruff" check .
"$BIN/ruff" format --check --quiet . || {
  echo "The files above are not formatted: run '$BIN/ruff format .'" >&2
  "$BIN/ruff" format --check . >&2 || true
  exit 1
}
# A file stays in one process (loadfile), so what its tests share is compiled once; tests/conftest.py
# says which begin first.
exec "$BIN/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
