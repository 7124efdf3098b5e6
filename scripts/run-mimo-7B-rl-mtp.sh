#!/usr/bin/env bash
# GRPO on MiMo-7B-RL, which drafts with the MTP layer of its own checkpoint, on eight GPUs shared by turns.
# Trailing arguments pass through and win; --dry-run prints the whole plan and starts nothing.
# MODEL_DIR names the checkpoint folder; lib.sh has what else the environment sets.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/MiMo-7B-RL}"

launch mimo-7b-rl-mtp --hf-checkpoint "$MODEL_DIR" "$@"
