"""What a visit to a GPU measures: menus of parts, each a command that writes a report of rows.

A visit lasts a quarter of an hour, so a part is small, has a limit, and is a process of its own: one that hangs, runs
out of memory or breaks the device's context takes no other part with it. Each has a rehearsal on a CPU, the same
command with small sizes, so that no visit meets a line of code for the first time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unpack import SGLANG_PYTHON

# Stand for the file that a command writes, as slime-spec bench --json does, and for a rehearsal's tiny checkpoints.
REPORT, POLICY, DRAFT = "{report}", "{policy}", "{draft}"
BENCH = ("-m", "slime_spec", "bench")
CHAIN = ("--shapes", "s3k1n4")


@dataclass(frozen=True)
class Part:
    """Measures one thing; ``on_gpu`` and ``on_cpu`` are arguments of Python, and ``limit_s`` what a GPU's may take."""

    name: str
    limit_s: int
    on_gpu: tuple[str, ...]
    on_cpu: tuple[str, ...]

    def command(self, device: str, report: Path, stand_ins: Path) -> list[str]:
        values = {REPORT: str(report), POLICY: str(stand_ins / "policy"), DRAFT: str(stand_ins / "draft")}
        return [values.get(word, word) for word in (self.on_gpu if device == "cuda" else self.on_cpu)]


def _bench(name: str, part: str, limit_s: int, on_gpu: tuple[str, ...] = (), on_cpu: tuple[str, ...] = ()) -> Part:
    """A part of a benchmark, which has ``--num-gpus``."""
    words = (*BENCH, name, "--only", part, "--json", REPORT, "--num-gpus")
    return Part(f"{name} {part}", limit_s, (*words, "1", *on_gpu), (*words, "0", *on_cpu))


def _shape(name: str, limit_s: int) -> Part:
    """The costs of an engine of a named shape, whose draft drafts chains of three; "tiny" is the rehearsal's."""
    words = (*BENCH, "engine", "--only", "cost", "--json", REPORT, "--rounds", "1", *CHAIN, "--dtypes", "bfloat16")
    words += ("--batch-sizes", "1", "8", "--num-gpus")
    return Part(
        f"engine cost {name}", limit_s, (*words, "1", "--model-shape", name), (*words, "0", "--model-shape", "tiny")
    )


# The rehearsal of the engine's benchmark: short replies of a tiny policy, one dtype, one chain.
BRIEF = ("--model", POLICY, "--draft", DRAFT, "--rounds", "1", "--new-tokens", "8", "--dtypes", "bfloat16")
# A part that sees its seconds gone begins nothing more: its limit is those, the start and one measurement.
SHORT = ("--new-tokens", "64")
TWICE = ("--rounds", "2")
TESTS, LAWS = ("scripts/gpu/device_tests.py", REPORT), "test_verify_statistics.py"
MENUS: dict[str, tuple[Part, ...]] = {
    "engine": (
        _bench("device", "ceilings", 40),
        _bench("device", "shapes", 120, on_cpu=TWICE),
        _bench("device", "profile", 60, on_cpu=TWICE),
        _bench("device", "attention", 150, ("--seconds", "110")),
        _bench("device", "draft_dtype", 120, ("--rounds", "5"), TWICE),
        _bench("engine", "exactness", 80, (*SHORT, "--num-prompts", "8", "--seconds", "40"), (*BRIEF, *CHAIN)),
        _bench("engine", "plain", 80, (*SHORT, *TWICE, "--seconds", "40"), BRIEF),
        _bench(
            "engine",
            "eagle3",
            120,
            (*SHORT, *TWICE, *CHAIN, "--dtypes", "bfloat16", "--seconds", "60"),
            (*BRIEF, *CHAIN),
        ),
        _bench("engine", "cost", 90, ("--rounds", "1", "--dtypes", "bfloat16"), BRIEF),
        _shape("8b", 120),
        Part(
            "device tests",
            200,
            (*TESTS, "--device", "cuda", "--processes", "12", "--limit-s", "180"),
            (*TESTS, "--device", "cpu", "--only", "test_tree_attention.py"),
        ),
        Part(
            "sampling laws",
            240,
            (
                *(*TESTS, "--choice", "sampling_laws", "--device", "cuda", "--processes", "14"),
                *("--limit-s", "220", "--only", LAWS),
            ),
            # The shortest of the proofs, with a tenth of their samples.
            (*TESTS, "--device", "cpu", "--only", LAWS, "--match", "first_drafts and 20000 and not 200000"),
        ),
    ),
    "step": (
        _bench("device", "ipc", 60),
        _bench("device", "push", 90),
        _bench("device", "trainer", 60, on_cpu=TWICE),
        Part(
            "rl steps",
            240,
            ("scripts/gpu/rl_steps.py", REPORT, "--num-gpus", "1", "--turns", "4", "--num-rollout", "4"),
            ("scripts/gpu/rl_steps.py", REPORT, "--num-gpus", "0", "--policy", POLICY, "--draft", DRAFT),
        ),
    ),
    # The rehearsal of these is the tests of the real server, which need minutes and an environment of their own.
    "sglang": tuple(
        _bench(
            "sglang",
            part,
            150,
            (
                *("--sglang-python", str(SGLANG_PYTHON), "--dtype", "bfloat16"),
                *("--rounds", "1", "--batch-sizes", "1", "8", "64"),
            ),
        )
        for part in ("exactness", "speed", "push", "stale")
    ),
}
REHEARSED = ("engine", "step")
