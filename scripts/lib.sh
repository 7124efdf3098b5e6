# shellcheck shell=bash
# Shared by every script: the environment (a .venv with pinned packages), set up once.
# Overridable: SLIME_SPEC_VENV (where the environment is), PYTHON (which Python makes it, 3.11 or 3.12).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SLIME_SPEC_VENV="${SLIME_SPEC_VENV:-$ROOT/.venv}"

# The environment is complete when it holds a stamp with the hash of what was asked for and the checkout that it runs:
# an installed package is a link to one checkout, so that a second one would run, or silently become, the first.
_wanted_stamp() {
  cat "$ROOT/constraints.txt" "$ROOT/setup.py" | sha256sum | cut -d' ' -f1
}

_refuse_anothers() {
  [[ -f "$1" ]] || return 0
  local owner
  owner="$(cut -d' ' -f2- "$1")"
  if [[ "$owner" != "$ROOT" && -f "$owner/setup.py" ]]; then
    echo "error: SLIME_SPEC_VENV" >&2
    echo "  rule:   must be this checkout's own environment; this one runs the checkout $owner" >&2
    echo "  value:  $SLIME_SPEC_VENV" >&2
    echo "  remedy: Leave SLIME_SPEC_VENV out (the environment is $ROOT/.venv then), or name another folder." >&2
    exit 2
  fi
}

ensure_venv() {
  local stamp="$SLIME_SPEC_VENV/.slime_spec_stamp" wanted
  wanted="$(_wanted_stamp) $ROOT"
  if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    return
  fi
  _refuse_anothers "$stamp"
  local python="${PYTHON:-python3.11}"
  command -v "$python" >/dev/null || python=python3
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || {
    echo "slime_spec needs Python 3.11 or 3.12, but $python is $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
    exit 2
  }
  echo "setting up $SLIME_SPEC_VENV (once, about two minutes)" >&2
  [[ -x "$SLIME_SPEC_VENV/bin/python" ]] || "$python" -m venv "$SLIME_SPEC_VENV"
  local pip=("$SLIME_SPEC_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location)
  # torch first and by exact pin: every other order lets a dependency choose another build of it.
  "${pip[@]}" "$(grep '^torch==' "$ROOT/constraints.txt")"
  "${pip[@]}" --constraint "$ROOT/constraints.txt" --editable "${ROOT}[dev]"
  echo "$wanted" >"$stamp"
}

slime_spec() {
  "$SLIME_SPEC_VENV/bin/python" -m slime_spec "$@"
}

# run_slime_spec COMMAND [flags]: the same in this shell's place, so that signals reach the run and not its shell alone.
run_slime_spec() {
  exec "$SLIME_SPEC_VENV/bin/python" -m slime_spec "$@"
}

# launch EXPERIMENT [flags]: `slime-spec train` with a named configuration, its run named after it and the time.
# SLIME_SPEC_COMMAND chooses another command of the same flags (config, rollout, doctor); SGLANG_PYTHON is the Python of
# the environment that has sglang, where it is not this one. PROMPT_DATA names a file of problems with the keys "prompt" and
# "label", as dapo-math-17k.jsonl, rewarded as --rm-type math (conf/data/math.yaml); data=arithmetic is the built-in task.
launch() {
  local experiment="$1" sglang=() data=()
  shift
  if [[ -n "${PROMPT_DATA:-}" ]]; then
    data=(data=math --prompt-data "$PROMPT_DATA")
  fi
  if [[ -n "${SGLANG_PYTHON:-}" ]]; then
    sglang=(--sglang-python "$SGLANG_PYTHON")
  fi
  ensure_venv
  run_slime_spec "${SLIME_SPEC_COMMAND:-train}" --config "$experiment" \
    --run-name "$experiment-$(date +%Y%m%d-%H%M%S)" "${sglang[@]}" "${data[@]}" "$@"
}
