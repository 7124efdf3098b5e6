#!/usr/bin/env bash
# GRPO on GLM-4.5 (355B, 32B active) with its own MTP layer, on eight nodes of eight 141 GB GPUs.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing; --debug-rollout-only generates
# without a trainer. On one node of eight 141 GB GPUs: cluster=gpus8_one_engine --debug-rollout-only.
# MODEL_DIR names the checkpoint folder, PROMPT_DATA a file of prompts; lib.sh has what else the environment sets.
# Not run on a GPU: on CPUs with a tiny checkpoint of the same format; the plan is of the real config.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/GLM-4.5}"

launch glm4.5-355b-a32b-mtp --hf-checkpoint "$MODEL_DIR" "$@"
