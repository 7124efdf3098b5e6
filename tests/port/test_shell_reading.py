"""The reader of launch scripts gives the words that bash gives, and tells of what it cannot know. Bash is the judge."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch.port.script import Launch, read_script
from slime_spec.launch.port.text import fields, open_part, quoted, shown

# Stands in for Python: prints the words behind train.py, a NUL after each.
PRINTS = """
python3() { while [ "$1" != train.py ]; do shift; done; shift; printf '%s\\0' "$@"; }
ray() { while [ "$1" != -- ]; do shift; done; shift; "$@"; }
pkill() { :; }
sleep() { :; }
"""
ENVIRONMENT = {"GIVEN": "from outside", "EMPTY": "", "PATH": "/usr/bin:/bin"}


def read(folder: Path, text: str, environment: dict[str, str] = ENVIRONMENT) -> Launch:
    (folder / "run.sh").write_text(text)
    return read_script(folder / "run.sh", environment)


def words_of_bash(folder: Path, text: str) -> list[str]:
    (folder / "judge.sh").write_text(PRINTS + text.replace("run.sh", "judge.sh"))
    done = subprocess.run(["bash", folder / "judge.sh"], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


# Statements before `python3 train.py WORDS`, and the words.
CASES = [
    ("", "--lr 1e-6 --flag"),
    ("A=(--one 1 # --no 2\n  #--three\n  --four '4 5' \"6 7\"\n\n  --eight)", '"${A[@]}" ${A[@]}'),
    ('A=(--x)\nA+=(--y $GIVEN "$GIVEN")', '"${A[@]}"'),
    ('B=${BASE:-/data}; C="${BASE:-$B}/x"', "--p $C/model --q ${C}/${B##*/} --r \"${C%/x}\" '$C'"),
    ("B=${GIVEN:-no} C=${EMPTY:-yes} D=${EMPTY-no} E=${GIVEN:+alt} F=${EMPTY:+no}", '"$B" "$C" "$D" "$E" "$F" $F end'),
    ("N=4; CP=2", "--t $((96000 / CP)) --u $(( 4 * 512 * 1024 * 1024)) --v $((N - 7)) --w $(( (N + 1) * 2 % 7 ))"),
    ("", '--bs 1 2 $(seq 3 5) $(seq 8 8 32) $(seq 3) "$(seq 1 2)"'),
    ('J=\'{"a": "b c"}\'', '--j "$J" --k "{\\"x\\": \\"$GIVEN\\"}" --l "\\$GIVEN" --m a\\ b --n "a   b ${GIVEN}  c"'),
    ('if [ -z "$NONE" ]; then X=1; else X=2; fi; if [[ "$GIVEN" == from* ]]; then Y=1; fi', "$X $Y"),
    ('X=1; if [ "$X" -gt 3 ]; then Z=a; elif [ "$X" = 1 ]; then Z=b; else Z=c; fi', "$Z"),
    ('X=0; [ -n "$NONE" ] && X=1; [ -n "$GIVEN" ] && Y=2; [ -d /nowhere ] || W=3', "$X $Y $W"),
    ("X=b; case $X in a) Y=1 ;; b|c) Y=2 ;; *) Y=3 ;; esac", "--y $Y"),
    ("A=(); for n in 1 2 3; do A+=(--n $n); done", '"${A[@]}"'),
    ("set_it() { X=$1; Y=7; }\nset_it", "--y $Y"),
    ('export X=5 Y="a b"; declare Z=c; readonly W=d', '$X "$Y" $Z $W'),
    ("A=(a b c); A[1]='x y'; A[3]=d", '"${A[@]}" "${A[0]}" ${A}'),
    ('D="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"; E="$(cd "$D/../.." && pwd)"', '"$D" "$E"'),
    ('source "$(dirname -- "$0")/models/m.sh"', '"${MODEL_ARGS[@]}" "$WHERE"'),
    ('MODEL_LAYERS=5 source "$(dirname -- "$0")/models/m.sh"', '"${MODEL_ARGS[@]}" "[$MODEL_LAYERS]"'),
    ("D=3 M=${M:-89}; A=(--freq [0]*$D+[1]*${M} --x [1]*62)", '"${A[@]}" --y [2]*$D+$M'),
    ("U=(${U[@]} --a)", "${U[@]} ${NOT_THERE[@]} end"),
]
MODEL = """
MODEL_ARGS=(--num-layers ${MODEL_LAYERS:-36} --swiglu)
WHERE="$(basename "$(dirname -- "${BASH_SOURCE[0]}")")"
"""


@pytest.mark.parametrize(("before", "words"), CASES)
def test_words_are_bashs(before: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.sh").write_text(MODEL)
    text = f"{before}\npython3 train.py {words}\n"
    expected = words_of_bash(tmp_path, text)
    launch = read(tmp_path, text)
    assert launch.words == expected
    assert launch.not_followed == []


SCRIPT = """#!/bin/bash
pkill -9 sglang
set -e
LINKS=$(nvidia-smi topo -m | wc -l)
if [ "$LINKS" -gt 0 ]; then HAS=1; else HAS=0; fi
echo "HAS: $HAS"
HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${HERE}/models/m.sh"
CKPT_ARGS=(
   --hf-checkpoint /data/M/
   #--hf-checkpoint /data/M-FP8
   --save "${HERE}/out/"   # kept
)
OFF_ARGS=(
   # --use-wandb
)
ENV_JSON="{ \\"env_vars\\": { \\"HAS\\": \\"${HAS}\\" } }"
ray job submit --address="http://127.0.0.1:8265" \\
   --runtime-env-json="${ENV_JSON}" \\
   -- python3 -u train.py \\
   --actor-num-nodes 2 \\
   ${MODEL_ARGS[@]} \\
   ${CKPT_ARGS[@]} \\
   ${OFF_ARGS[@]} 2>&1 | cat
"""


def test_a_whole_script_in_slimes_shape_is_read_as_bash_runs_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.sh").write_text(MODEL)
    launch = read(tmp_path, SCRIPT)
    assert launch.program == "train.py"
    assert launch.words == words_of_bash(
        tmp_path, SCRIPT.replace("nvidia-smi topo -m", "true").replace('echo "HAS', ': "HAS')
    )
    assert launch.words[-2:] == ["--save", f"{tmp_path}/out/"]
    assert launch.not_followed == []  # HAS is in none of the words


def test_what_the_script_does_not_say_stays_open_and_is_told_by_its_line(tmp_path: Path) -> None:
    text = (
        'N=$(nvidia-smi -L | wc -l)\nif [ "$N" -gt 0 ]; then M=$N; fi\n'
        "python3 train.py --a $M --b $BASE_DIR/x --c $(date +%s) ${OTHER[@]} $UNSET\n"
    )
    launch = read(tmp_path, text, {})
    assert list(map(shown, launch.words)) == ["--a", "${M}", "--b", "${BASE_DIR}/x", "--c", "$(date +%s)", "${UNSET}"]
    assert launch.not_followed == [
        'run.sh:2 has a condition that is not known here (sets M): if [ "$N" -gt 0 ]; then M=$N; fi'
    ]
    assert read(tmp_path, text, {"BASE_DIR": "/d"}).words[3] == "/d/x"


def test_a_file_that_lies_elsewhere_is_found_by_the_end_of_its_path_or_told(tmp_path: Path) -> None:
    (tmp_path / "scripts" / "models").mkdir(parents=True)
    (tmp_path / "scripts" / "models" / "m.sh").write_text(MODEL)
    (tmp_path / "examples").mkdir()
    text = "source /root/slime/scripts/models/m.sh\nsource /root/gone.sh\npython3 train.py ${MODEL_ARGS[@]}\n"
    launch = read(tmp_path / "examples", text)
    assert launch.words == ["--num-layers", "36", "--swiglu"]
    assert launch.not_followed == ["run.sh:2 names a file that is not here: source /root/gone.sh"]


def test_a_launch_that_lost_its_continuation_is_told(tmp_path: Path) -> None:
    launch = read(tmp_path, "A=(--lr 1)\npython3 train.py \\\n --colocate\n ${A[@]} \\\n --b\n")
    assert launch.words == ["--colocate"]
    assert launch.not_followed == [
        "run.sh:4 is no part of the launch, for the line before it does not end in \\: ${A[@]} \\"
    ]


def test_nothing_of_a_script_is_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    read(tmp_path, f"touch {made}\nX=$(touch {made})\necho > {made}\npython3 train.py $X\n")
    assert not made.exists()


@pytest.mark.parametrize("text", ["echo hello\n", "python3 eval.py --x\n", ""])
def test_a_script_without_a_launch_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must call slime's train"):
        read(tmp_path, text)


def test_a_file_that_sources_itself_ends(tmp_path: Path) -> None:
    launch = read(tmp_path, 'source "$0"\npython3 train.py --x\n')
    assert launch.words == ["--x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("for a in $(seq 900); do for b in $(seq 900); do X=1; done; done\n", "within 100000 statements"),
        ("if true; then\n" * 3000 + "X=1\n" + "fi\n" * 3000, "nests its statements too deeply"),
        ("\x00\xff", "must call"),
        ("f() { f; f; }\nf\n", "within 100000 statements"),
    ],
)
def test_a_hostile_script_ends_in_one_error(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, text)


def test_a_variable_that_grows_without_end_is_left_open(tmp_path: Path) -> None:
    launch = read(tmp_path, "X=ab\nfor a in $(seq 40); do X=$X$X; done\npython3 train.py --x $X\n")
    assert len(" ".join(launch.words)) < 1_100_000


def test_text_with_open_parts_is_quoted_so_that_bash_fills_them_in() -> None:
    text = "/a b/" + open_part("${GIVEN}") + "/'c'" + open_part("$(echo 'x  y')")
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {quoted(text)}"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout == "/a b/from outside/'c'x  y\0"
    assert fields(f"a {text} b") == ["a", "/a", "b/" + text[5:], "b"]
    assert quoted("") == "''"
