#!/usr/bin/env bash
# Sets up what the tests need and runs them; arguments go to pytest. Long proofs run last.
#   bash scripts/test.sh                 everything but the real SGLang server's tests (-m sglang_server)
#   bash scripts/test.sh -m "not long and not sglang_server"   without the proofs of minutes as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ensure_venv
cd "$ROOT"
export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
if [[ ! -f models/SmolLM2-135M-Instruct/config.json ]]; then
  slime_spec models fetch smollm2-135m
fi
# A later -m in the arguments wins over this one.
"$SLIME_SPEC_VENV/bin/python" -m pytest -m "not sglang_server" "$@"
