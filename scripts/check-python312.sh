#!/usr/bin/env bash
# Checks on Python 3.12 what needs no torch, in seconds: that every source compiles there without a warning, and the command
# line from flags to a configuration, with its tests. Torch for 3.12 on a CPU is no package of PyPI's (its CUDA build is 5 GB),
# so that engines and trainer are tested on 3.11 alone. PYTHON312 names a Python 3.12; pyenv's is found, and in CI (CI=1) apt's is
# installed where the distribution has one. Says that nothing was checked, and ends well, where there is none.
#   bash scripts/check-python312.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON312:-}"
find_python() {
  local found
  for found in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
    [[ -n "$python" ]] || ! "$found" --version >/dev/null 2>&1 || python="$found"
  done
}
find_python
if [[ -z "$python" && -n "${CI:-}" ]] && apt-get update -qq >/dev/null 2>&1; then
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends python3.12-venv >/dev/null 2>&1 || true
  find_python
fi
if [[ -z "$python" ]]; then
  cat >&2 <<'TOLD'
==================== NOT CHECKED ON PYTHON 3.12 ====================
There is none here. Unchecked are that every source compiles on it, and the
command line's tests. Set PYTHON312=/path/to/python3.12.
====================================================================
TOLD
  exit 0
fi

"$python" -W error - <<'PROGRAM'
from pathlib import Path

for folder in ("slime_spec", "rollout", "trainer_bridge", "scripts", "tests"):
    for path in Path(folder).rglob("*.py"):
        compile(path.read_bytes(), str(path), "exec")
PROGRAM

packages=(hydra-core PyYAML numpy xxhash tree-sitter tree-sitter-bash pytest hypothesis)
key="$(cat constraints.txt <(echo "$python ${packages[*]}") | sha256sum | cut -c1-16)"
environment="${XDG_CACHE_HOME:-$HOME/.cache}/slime_spec/python312-$key"
if [[ ! -f "$environment/complete" ]]; then
  rm -rf "$environment"
  "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "${packages[@]}"
  touch "$environment/complete"
fi
tests=(config/test_config_build.py config/test_sglang_flags.py config/test_megatron_flags.py config/test_slime_defaults.py)
tests+=(config/test_completion.py config/test_texts.py port/test_port_command.py test_suggest.py)
PYTHONPATH="$PWD" OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q -p no:cacheprovider "${tests[@]/#/tests/}"
