#!/usr/bin/env bash
# Installs the SGLang that the tests run on a CPU, in an environment of its own, once; prints its Python's path.
#   bash scripts/install-sglang-cpu.sh            the release that requirements.txt pins
#   bash scripts/install-sglang-cpu.sh 0.5.20     another one, over the same dependencies (seen to suit 0.5.20, 0.5.21 and 0.5.23)
# The environment is cached by what it holds, beside the other caches (XDG_CACHE_HOME). PYTHON chooses its Python 3.11.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

requirements="$ROOT/tests/support/sglang_cpu/requirements.txt"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/slime_spec"
key="$(sha256sum "$requirements" | cut -c1-16)"
environment="$cache/sglang-cpu-$key"
release="${1:-}"

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

# A small environment that finds its own sglang first and everything else in the one beside it.
install_release() {
  local over="$environment-$release" packages
  rm -rf "$over"
  "$environment/bin/python" -m venv --without-pip "$over"
  packages="$("$over/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  "$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/dependencies.pth"
  "$environment/bin/python" -m pip --python "$over/bin/python" install --quiet --disable-pip-version-check \
    --no-warn-script-location --no-deps "sglang==$release"
  touch "$over/complete"
}

mkdir -p "$cache"
exec 9>"$cache/sglang-cpu.lock"
flock 9 # two test runs at once install it once
[[ -f "$environment/complete" ]] || install >&2
if [[ -n "$release" ]]; then
  [[ -f "$environment-$release/complete" ]] || install_release >&2
  environment="$environment-$release"
fi
echo "$environment/bin/python"
