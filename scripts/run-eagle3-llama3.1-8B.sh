#!/usr/bin/env bash
# GRPO on Llama-3.1-8B-Instruct with an external EAGLE-3 draft, on eight 80 GB GPUs that engines and trainer share.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing; --debug-rollout-only generates
# without a trainer.
# MODEL_DIR and DRAFT_DIR name the checkpoint folders, PROMPT_DATA a file of prompts; lib.sh has what else the environment sets.
# Not run on a GPU: on CPUs with a tiny checkpoint of the same format; the plan is of the real config.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/Llama-3.1-8B-Instruct}"
DRAFT_DIR="${DRAFT_DIR:-$ROOT/models/sglang-EAGLE3-LLaMA3.1-Instruct-8B}"

launch eagle3-llama3.1-8b --hf-checkpoint "$MODEL_DIR" \
  --sglang-speculative-draft-model-path "$DRAFT_DIR" "$@"
