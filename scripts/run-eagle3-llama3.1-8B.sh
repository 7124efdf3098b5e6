#!/usr/bin/env bash
# GRPO on Llama-3.1-8B-Instruct with an external EAGLE-3 draft, on eight GPUs that engines and trainer share.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing.
# MODEL_DIR and DRAFT_DIR name the checkpoint folders; lib.sh has what else the environment sets.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/Llama-3.1-8B-Instruct}"
DRAFT_DIR="${DRAFT_DIR:-$ROOT/models/sglang-EAGLE3-LLaMA3.1-Instruct-8B}"

launch eagle3-llama3.1-8b --hf-checkpoint "$MODEL_DIR" \
  --sglang-speculative-draft-model-path "$DRAFT_DIR" "$@"
