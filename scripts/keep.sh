#!/usr/bin/env bash
# Keeps a run going until it is complete, on this machine, on queued TPU VMs or under SLURM:
#
#   bash scripts/keep.sh [OPTION ...] -- COMMAND ...
#
# `bash scripts/keep.sh --help` says more. Needs a Python alone, not the project's environment.
set -euo pipefail

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ -x "$PYTHON" ]] || PYTHON="$(command -v python3)" || die "there is no python3; install one."
exec_module scripts.keep "$@"
