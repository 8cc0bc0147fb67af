#!/usr/bin/env bash
# Trains a model; run again, it continues where it stopped.
#
#   bash scripts/run_pretrain.sh
#       with nothing given: sets up, makes the demo data from this machine's own Python, and trains
#       openmoe_tiny on it in runs/openmoe_tiny (minutes on two cores, 8 simulated devices).
#   OBJECTIVE=full_lm bash scripts/run_pretrain.sh
#       the same with next-token prediction in place of UL2.
#   MODEL=openmoe_8b MODEL_DIR=gs://... TFDS_DATA_DIR=gs://... bash scripts/run_pretrain.sh
#       on every host of a TPU pod: installs the TPU extra and starts one process per host.
#
# MODEL           a file of gin/models (default: openmoe_tiny)
# MODEL_DIR       run directory, local or gs:// (default: runs/MODEL, or runs/MODEL_OBJECTIVE)
# EXPERIMENT      a file of gin/experiments; none applies no overlay (default: demo without
#                 TFDS_DATA_DIR, else the published run of MODEL)
# OBJECTIVE       also applies gin/experiments/EXPERIMENT_OBJECTIVE.gin, such as demo_full_lm
# TFDS_DATA_DIR   where the data sets are; without it the demo data is prepared
# ACCELERATOR     cpu, gpu or tpu (default: what is found)
# Arguments are passed on to scripts.train: --gin.TRAIN_STEPS=2000, --dry_run, ...
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

die() {
  printf '[run_pretrain] error: %s\n' "$*" >&2
  exit 1
}

list() { # the names that a folder of gin files offers
  find "gin/$1" -name '*.gin' -exec basename {} .gin \; | sort | xargs
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

choose_experiment() { # prints a name of gin/experiments, or none
  if [[ -n "${EXPERIMENT:-}" ]]; then
    [[ "$EXPERIMENT" == none || -f "gin/experiments/$EXPERIMENT.gin" ]] ||
      die "EXPERIMENT=$EXPERIMENT is not in gin/experiments; there are: $(list experiments), none."
    echo "$EXPERIMENT"
  elif [[ -z "${TFDS_DATA_DIR:-}" ]]; then
    echo demo
  else
    if [[ -f "gin/experiments/$MODEL.gin" ]]; then
      echo "$MODEL"
      return
    fi
    die "no published run of MODEL=$MODEL in gin/experiments; set EXPERIMENT to one of:" \
      "$(list experiments), or to none and give the missing --gin.NAME=VALUE yourself."
  fi
}

MODEL="${MODEL:-openmoe_tiny}"
# Another objective is another run: it must not continue the checkpoints of the first.
MODEL_DIR="${MODEL_DIR:-runs/$MODEL${OBJECTIVE:+_$OBJECTIVE}}"
[[ -f "gin/models/$MODEL.gin" ]] ||
  die "MODEL=$MODEL is not in gin/models; there are: $(list models)."
experiment="$(choose_experiment)"

accelerator="${ACCELERATOR:-$(find_accelerator)}"
case "$accelerator" in
  tpu)
    bash scripts/setup_env.sh tpu
    args=(--multiprocess)
    ;;
  gpu)
    bash scripts/setup_env.sh cuda
    args=()
    ;;
  cpu)
    bash scripts/setup_env.sh
    args=()
    export JAX_PLATFORMS=cpu
    # Simulated devices run the sharded path of a pod; a count that is already given is respected.
    if [[ "${XLA_FLAGS:-}" != *xla_force_host_platform_device_count* ]]; then
      export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8"
    fi
    ;;
  *) die "ACCELERATOR=$accelerator must be cpu, gpu or tpu." ;;
esac
PYTHON="${OPENMOE_VENV:-$ROOT/.venv}/bin/python"

# TensorFlow only reads data here; its start-up notices would bury ours.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0

args+=("--gin_file=gin/models/$MODEL.gin" --gin_file=gin/runs/pretrain.gin)
if [[ "$experiment" != none ]]; then
  args+=("--gin_file=gin/experiments/$experiment.gin")
fi
if [[ -n "${OBJECTIVE:-}" ]]; then
  overlay="gin/experiments/${experiment}_$OBJECTIVE.gin"
  [[ -f "$overlay" ]] ||
    die "OBJECTIVE=$OBJECTIVE needs $overlay, which is not there; there are: $(list experiments)."
  args+=("--gin_file=$overlay")
fi
if [[ -n "${TFDS_DATA_DIR:-}" ]]; then
  args+=("--tfds_data_dir=$TFDS_DATA_DIR")
elif [[ "$experiment" == demo* ]]; then
  "$PYTHON" -m scripts.prepare_demo
fi

exec "$PYTHON" -m scripts.train "${args[@]}" "--gin.MODEL_DIR='$MODEL_DIR'" "$@"
