#!/usr/bin/env bash
# Builds the TFDS data sets of every raw folder it finds; run again, it continues.
#
#   bash scripts/build_datasets.sh RAW_DIR DATA_DIR [--only=NAME,...] [--languages=python,c]
#
# RAW_DIR holds, in the publishers' own layout, any of
#   redpajama/{arxiv,c4,common_crawl,github,stackexchange,wikipedia}   .jsonl or .jsonl.zst
#   redpajama/book             no longer published; only from a copy of your own
#   the_stack_dedup            a clone of bigcode/the-stack-dedup: data/<language>/*.parquet
#   wildchat, orca             .parquet or .jsonl
# Checksum lists (*sha256*) inside a folder are verified. DATA_DIR is given to training as
# TFDS_DATA_DIR or --tfds_data_dir.
set -euo pipefail

if [[ $# -lt 2 ]]; then
  sed -n '2,14p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 64
fi
raw="$1" data="$2"
shift 2
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

bash "$ROOT/scripts/setup_env.sh" >&2
exec_module scripts.build_datasets --raw_dir="$raw" --data_dir="$data" "$@"
