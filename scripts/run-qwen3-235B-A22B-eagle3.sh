#!/usr/bin/env bash
# GRPO on Qwen3-235B-A22B with an external EAGLE-3 draft, on eight nodes of eight 141 GB GPUs.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing; --debug-rollout-only generates
# without a trainer. On one node of eight 141 GB GPUs: cluster=gpus8_one_engine --debug-rollout-only.
# MODEL_DIR and DRAFT_DIR name the checkpoint folders, PROMPT_DATA a file of prompts; lib.sh has what else the environment sets.
# Not run on a GPU: on CPUs with a tiny checkpoint of the same format; the plan is of the real config.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/Qwen3-235B-A22B}"
DRAFT_DIR="${DRAFT_DIR:-$ROOT/models/Qwen3-235B-A22B-EAGLE3}"

launch qwen3-235b-a22b-eagle3 --hf-checkpoint "$MODEL_DIR" \
  --sglang-speculative-draft-model-path "$DRAFT_DIR" "$@"
