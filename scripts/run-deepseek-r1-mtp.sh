#!/usr/bin/env bash
# GRPO on DeepSeek-R1 (671B, its published weights in fp8) with its own MTP layer, on sixteen nodes of eight 141 GB GPUs.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing; --debug-rollout-only generates
# without a trainer.
# Rollouts alone on one such node: cluster=gpus8_one_engine --debug-rollout-only.
# MODEL_DIR names the checkpoint folder, PROMPT_DATA a file of prompts; lib.sh has what else the environment sets.
# Not run on a GPU: on CPUs with a tiny checkpoint of the same format; the plan is of the real config.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/DeepSeek-R1}"

launch deepseek-r1-mtp --hf-checkpoint "$MODEL_DIR" "$@"
