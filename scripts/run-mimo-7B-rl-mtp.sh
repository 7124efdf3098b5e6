#!/usr/bin/env bash
# GRPO on MiMo-7B-RL, which drafts with its own MTP layer and trains it, on eight 80 GB GPUs shared by turns.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing; --debug-rollout-only generates
# without a trainer.
# MODEL_DIR names the checkpoint folder, PROMPT_DATA a file of prompts; lib.sh has what else the environment sets.
# Not run on a GPU: on CPUs with a tiny checkpoint of the same format; the plan is of the real config.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/MiMo-7B-RL}"

launch mimo-7b-rl-mtp --hf-checkpoint "$MODEL_DIR" "$@"
