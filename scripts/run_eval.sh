#!/usr/bin/env bash
# Evaluates a checkpoint; run again, it does what is not finished yet.
#
#   bash scripts/run_eval.sh
#       with nothing given: evaluates runs/openmoe_tiny (made by scripts/run_pretrain.sh) on a few
#       tasks of BIG-bench-Lite, which it fetches first (358 MB, of which 71 MB are kept).
#   MODEL=openmoe_8b CHECKPOINT=gs://... TASKS=bigbench_lite bash scripts/run_eval.sh
#       the full run, on every host of a pod at the same time.
#
# CHECKPOINT      run directory, checkpoint_<step> folder or Hugging Face folder
#                 (default: runs/MODEL, the run of scripts/run_pretrain.sh)
# MODEL           a name of gin/models that CHECKPOINT must agree with (default: not checked)
# VOCABULARY      SentencePiece model, for checkpoints that do not say theirs
# TASKS           names with commas: bigbench_lite, openmoe, jetmoe, or single ones
# SHOTS           solved examples in a prompt (default: as published; 1 for the demo)
# PROMPT_MODE     fixed, or reference with the original's quirks
# OUT_DIR         for results (default: eval/ in the run, by checkpoint and mode); on several hosts
#                 a place that all of them see
# BIGBENCH_DIR    the task files of BIG-bench-Lite (default: runs/bigbench_lite; fetched if absent)
# DATA_DIR        the files of the other benchmarks (default: runs/evaluation_data)
# ACCELERATOR     cpu, gpu or tpu (default: what is found)
# Paths are relative to where you stand.
# Arguments are passed on to scripts.evaluate: --gin.MAX_ITEMS=100, ...
set -euo pipefail

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ -z "${MODEL:-}" || -f "$ROOT/gin/models/$MODEL.gin" ]] ||
  die "MODEL=$MODEL is not in gin/models; there are: $(list models)."
CHECKPOINT="${CHECKPOINT:-runs/${MODEL:-openmoe_tiny}}"
if [[ "$CHECKPOINT" != *://* && ! -e "$CHECKPOINT" ]]; then
  die "there is no $CHECKPOINT; 'bash scripts/run_pretrain.sh' makes runs/openmoe_tiny in minutes," \
    "or set CHECKPOINT to a run, a checkpoint or a Hugging Face folder."
fi

args=(--gin_file=gin/runs/eval.gin "--gin.CHECKPOINT='$CHECKPOINT'")
if [[ -z "${TASKS:-}" ]]; then
  TASKS=known_unknowns,novel_concepts,hindu_knowledge,operators
  SHOTS="${SHOTS:-1}"
  args+=(--gin.MAX_ITEMS=64 --gin.MAX_NEW_TOKENS=24)
fi
# Results are kept apart by checkpoint and mode: a run that trained on is another model.
if [[ -z "${OUT_DIR:-}" ]]; then
  run="$CHECKPOINT"
  if [[ "$(basename "$CHECKPOINT")" == checkpoint_* ]]; then run="$(dirname "$CHECKPOINT")"; fi
  OUT_DIR="$run/eval/{checkpoint}_${PROMPT_MODE:-fixed}"
fi
BIGBENCH_DIR="${BIGBENCH_DIR:-runs/bigbench_lite}"

accelerator="${ACCELERATOR:-$(find_accelerator)}"
set_up "$accelerator"
if [[ "$accelerator" == tpu ]]; then args+=(--multiprocess); fi

# Fetched where a task of BIG-bench-Lite is asked for; with the files in place nothing happens.
if "$PYTHON" -P - "$TASKS" <<'PY'
import sys
from tasks.bigbench.files import TASKS

sys.exit(not {'bigbench_lite', *TASKS} & set(sys.argv[1].split(',')))
PY
then
  run_module scripts.fetch_bigbench_lite --out "$BIGBENCH_DIR"
fi

names="$(printf "'%s'," ${TASKS//,/ })"
args+=("--gin.TASKS=($names)" "--gin.OUT_DIR='$OUT_DIR'" "--gin.BIGBENCH_DIR='$BIGBENCH_DIR'")
if [[ -n "${MODEL:-}" ]]; then args+=("--gin.MODEL='$MODEL'"); fi
if [[ -n "${VOCABULARY:-}" ]]; then args+=("--gin.VOCABULARY='$VOCABULARY'"); fi
if [[ -n "${SHOTS:-}" ]]; then args+=("--gin.SHOTS=$SHOTS"); fi
if [[ -n "${PROMPT_MODE:-}" ]]; then args+=("--gin.PROMPT_MODE='$PROMPT_MODE'"); fi
if [[ -n "${DATA_DIR:-}" ]]; then args+=("--gin.DATA_DIR='$DATA_DIR'"); fi

exec_module scripts.evaluate "${args[@]}" "$@"
