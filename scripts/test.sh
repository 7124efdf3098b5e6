#!/usr/bin/env bash
# Sets up what the tests need and runs them, two files at a time; arguments go to pytest. Long proofs run first,
# so that quick tests are left for whichever process is free at the end.
#   bash scripts/test.sh                                  everything
#   bash scripts/test.sh -m "not sglang_server"           without the real SGLang server (an environment of its own)
#   bash scripts/test.sh -m "not long and not sglang_server"   without the proofs of minutes as well
#   bash scripts/test.sh --record-proofs                  also the proofs of what has not changed, and note that they stand
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ensure_venv
cd "$ROOT"
export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
if [[ ! -f models/SmolLM2-135M-Instruct/config.json ]]; then
  slime_spec models fetch smollm2-135m
fi
# Tests start hundreds of processes; each would compile the project anew where the environment says not to keep bytecode.
unset PYTHONDONTWRITEBYTECODE
# Two processes with a thread each: threads that wait for each other at barriers would make both many times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
"$SLIME_SPEC_VENV/bin/python" -m pytest -n 2 --dist loadscope --no-loadscope-reorder "$@"
