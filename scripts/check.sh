#!/usr/bin/env bash
# The one gate: format, lint, types, shell scripts, the Dockerfile, then the tests. "static" stops before the tests.
#   bash scripts/check.sh [static]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ensure_venv
cd "$ROOT"
bin="$SLIME_SPEC_VENV/bin"
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/shellcheck" --source-path=SCRIPTDIR --external-sources scripts/*.sh .ci/run
"$bin/hadolint" Dockerfile
if [[ "${1:-}" != static ]]; then
  bash scripts/test.sh
fi
