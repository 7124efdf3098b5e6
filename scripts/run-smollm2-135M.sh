#!/usr/bin/env bash
# The main job: GRPO on SmolLM2-135M-Instruct with speculative rollouts, on a machine without a GPU.
# Trailing arguments pass through: bash scripts/run-smollm2-135M.sh --num-rollout 3 trainer.lr=5e-6
# SLIME_SPEC_COMMAND=config prints the resolved configuration instead; MODEL_DIR names another copy of the checkpoint, PROMPT_DATA
# a file of problems in place of the built-in arithmetic; lib.sh has what else the environment sets.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MODEL_DIR="${MODEL_DIR:-$ROOT/models/SmolLM2-135M-Instruct}"

ensure_venv
if [[ ! -f "$MODEL_DIR/config.json" ]]; then
  slime_spec models fetch smollm2-135m --output "$MODEL_DIR"
fi
launch smollm2-135m --hf-checkpoint "$MODEL_DIR" "$@"
