#!/usr/bin/env bash
# Installs the SGLang that the tests run on a CPU, in an environment of its own, once; prints its Python's path.
#   bash scripts/install-sglang-cpu.sh
# The environment is cached by what it holds, beside the other caches (XDG_CACHE_HOME). PYTHON chooses its Python 3.11.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

requirements="$ROOT/tests/support/sglang_cpu/requirements.txt"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/slime_spec"
key="$(sha256sum "$requirements" | cut -c1-16)"
environment="$cache/sglang-cpu-$key"

install() {
  local python="${PYTHON:-python3.11}" pip
  command -v "$python" >/dev/null || python=python3
  echo "installing SGLang for the CPU in $environment (once, about two minutes)" >&2
  rm -rf "$environment"
  "$python" -m venv "$environment"
  pip=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location)
  # torch with its dependencies (none for a CPU build), the rest exactly as listed.
  "${pip[@]}" "$(grep '^torch==' "$requirements")"
  "${pip[@]}" --no-deps --requirement "$requirements"
  touch "$environment/complete"
}

mkdir -p "$cache"
exec 9>"$cache/sglang-cpu.lock"
flock 9 # two test runs at once install it once
[[ -f "$environment/complete" ]] || install >&2
echo "$environment/bin/python"
