# What the shell scripts share; sourced by them. Sets ROOT, the project's directory.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() { # ends the script with a message
  printf '[%s] error: %s\n' "$(basename "$0" .sh)" "$*" >&2
  exit 1
}

list() { # the names that a folder of gin files offers
  find "$ROOT/gin/$1" -name '*.gin' -exec basename {} .gin \; | sort | xargs
}

find_accelerator() {
  if compgen -G '/dev/accel*' >/dev/null || [[ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}" ]]; then
    echo tpu
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo gpu
  elif compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    echo tpu # newer TPU VMs; after the GPU test, which passed-through GPUs would also match
  else
    echo cpu
  fi
}

set_up() { # ACCELERATOR: brings the environment up to date for it; says JAX where it is the CPU
  case "$1" in
    tpu) bash "$ROOT/scripts/setup_env.sh" tpu ;;
    gpu) bash "$ROOT/scripts/setup_env.sh" cuda ;;
    cpu)
      bash "$ROOT/scripts/setup_env.sh"
      export JAX_PLATFORMS=cpu
      # Large pages for what a step allocates: without them the kernel clears its buffers page by
      # page, a quarter of the demo's CPU time (docs/LOG.md). C libraries without the setting skip it.
      export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
      ;;
    *) die "ACCELERATOR=$1 must be cpu, gpu or tpu." ;;
  esac
}

# Paths on a command line are the user's, so scripts stay where the user stands and the project's
# packages are put on Python's path; -P keeps that directory's own names off it.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# TensorFlow only reads data here; its start-up notices would bury ours.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0
PYTHON="${OPENMOE_VENV:-$ROOT/.venv}/bin/python"

run_module() { # MODULE ARGUMENTS...
  "$PYTHON" -P -m "$@"
}

exec_module() { # the same in place of the shell, so that signals reach Python
  exec "$PYTHON" -P -m "$@"
}
