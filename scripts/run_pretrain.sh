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
# MACHINE         also applies gin/machines/MACHINE.gin, such as openmoe_8b_v5p: mesh and microbatches
#                 that were planned for it, where the experiment has the released ones (docs/PODS.md)
# OBJECTIVE       also applies gin/experiments/EXPERIMENT_OBJECTIVE.gin, such as demo_full_lm
# TFDS_DATA_DIR   where the data sets are; without it the demo data is prepared
# ACCELERATOR     cpu, gpu or tpu (default: what is found)
# Paths are relative to where you stand; gin files also to the project.
# Arguments are passed on to scripts.train: --gin.TRAIN_STEPS=2000, --dry_run, ...
set -euo pipefail

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

choose_experiment() { # prints a name of gin/experiments, or none
  if [[ -n "${EXPERIMENT:-}" ]]; then
    [[ "$EXPERIMENT" == none || -f "$ROOT/gin/experiments/$EXPERIMENT.gin" ]] ||
      die "EXPERIMENT=$EXPERIMENT is not in gin/experiments; there are: $(list experiments), none."
    echo "$EXPERIMENT"
  elif [[ -z "${TFDS_DATA_DIR:-}" ]]; then
    echo demo
  else
    if [[ -f "$ROOT/gin/experiments/$MODEL.gin" ]]; then
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
[[ -f "$ROOT/gin/models/$MODEL.gin" ]] ||
  die "MODEL=$MODEL is not in gin/models; there are: $(list models)."
experiment="$(choose_experiment)"

accelerator="${ACCELERATOR:-$(find_accelerator)}"
set_up "$accelerator"
args=()
if [[ "$accelerator" == tpu ]]; then args+=(--multiprocess); fi
# Simulated devices run the sharded path of a pod; a count that is already given is respected.
if [[ "$accelerator" == cpu && "${XLA_FLAGS:-}" != *xla_force_host_platform_device_count* ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8"
fi

args+=("--gin_file=gin/models/$MODEL.gin" --gin_file=gin/runs/pretrain.gin)
if [[ "$experiment" != none ]]; then
  args+=("--gin_file=gin/experiments/$experiment.gin")
fi
if [[ -n "${OBJECTIVE:-}" ]]; then
  overlay="gin/experiments/${experiment}_$OBJECTIVE.gin"
  [[ -f "$ROOT/$overlay" ]] ||
    die "OBJECTIVE=$OBJECTIVE needs $overlay, which is not there; there are: $(list experiments)."
  args+=("--gin_file=$overlay")
fi
if [[ -n "${MACHINE:-}" ]]; then
  [[ -f "$ROOT/gin/machines/$MACHINE.gin" ]] ||
    die "MACHINE=$MACHINE is not in gin/machines; there are: $(list machines)."
  args+=("--gin_file=gin/machines/$MACHINE.gin")
fi
if [[ -n "${TFDS_DATA_DIR:-}" ]]; then
  args+=("--tfds_data_dir=$TFDS_DATA_DIR")
elif [[ "$experiment" == demo* ]]; then
  run_module scripts.prepare_demo
fi

exec_module scripts.train "${args[@]}" "--gin.MODEL_DIR='$MODEL_DIR'" "$@"
