#!/usr/bin/env bash
# Rollouts of DeepSeek-R1 (671B, FP8) with its own MTP layer, one engine of eight 141 GB GPUs.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing.
# MODEL_DIR names the checkpoint folder; lib.sh has what else the environment sets.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/DeepSeek-R1}"

launch deepseek-r1-mtp --hf-checkpoint "$MODEL_DIR" "$@"
