#!/usr/bin/env bash
# Rollouts of Qwen3-235B-A22B with an external EAGLE-3 draft, one engine of eight 141 GB GPUs.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing.
# MODEL_DIR and DRAFT_DIR name the checkpoint folders; lib.sh has what else the environment sets.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/Qwen3-235B-A22B}"
DRAFT_DIR="${DRAFT_DIR:-$ROOT/models/Qwen3-235B-A22B-EAGLE3}"

launch qwen3-235b-a22b-eagle3 --hf-checkpoint "$MODEL_DIR" \
  --sglang-speculative-draft-model-path "$DRAFT_DIR" "$@"
