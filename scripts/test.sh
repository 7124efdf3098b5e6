#!/usr/bin/env bash
# Sets up what the tests need and runs them; arguments go to pytest. Long proofs run last.
#   bash scripts/test.sh                                  everything
#   bash scripts/test.sh -m "not sglang_server"           without the real SGLang server (an environment of its own)
#   bash scripts/test.sh -m "not long and not sglang_server"   without the proofs of minutes as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ensure_venv
cd "$ROOT"
export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
if [[ ! -f models/SmolLM2-135M-Instruct/config.json ]]; then
  slime_spec models fetch smollm2-135m
fi
"$SLIME_SPEC_VENV/bin/python" -m pytest "$@"
