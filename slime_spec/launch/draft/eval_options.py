"""Read and check the command line of ``slime-spec draft eval`` before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slime_spec.errors import ConfigError
from slime_spec.launch.draft.corpus_settings import CorpusSettings
from slime_spec.launch.draft.options import (
    DTYPES,
    FETCH,
    Parser,
    add_conventions,
    add_corpus,
    check_corpus,
    check_ranges,
    corpus_of,
)

PROG = "slime-spec draft eval"
DESCRIPTION = """\
Measure how a draft drafts for a target: by position, the share of its drafts that are accepted given that all earlier
ones were, and the tokens of a verify, on replies that the target gives to prompts (or has given: --conversations)."""


@dataclass(frozen=True)
class EvalOptions:
    """Holds the options of the command; ``num_positions`` is None for as many as the draft is judged by in training."""

    target: Path
    draft: str
    norm_output_convention: str
    corpus: CorpusSettings
    num_positions: int | None
    batch_size: int
    dtype: str
    device: str
    json: Path | None

    draft_vocab_size: None = None  # a draft has the vocabulary that it has


def read_eval_options(argv: Sequence[str]) -> EvalOptions:
    """Read the options; raises ConfigError for a flag, a value or a folder that cannot work."""
    given = _parser().parse_args(argv)
    check_ranges(given, PROG)
    if not (given.target / "config.json").is_file():
        raise ConfigError("--target", "must be a checkpoint folder with a config.json", str(given.target), FETCH)
    if given.json is not None and not given.json.parent.is_dir():
        raise ConfigError("--json", "must lie in a folder that is there", str(given.json), "Make it first.")
    check_corpus(given)
    return EvalOptions(
        target=given.target,
        draft=given.draft,
        norm_output_convention=given.norm_output_convention or "sglang",
        corpus=corpus_of(given),
        num_positions=given.num_positions,
        batch_size=given.batch_size,
        dtype=given.dtype,
        device=given.device,
        json=given.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROG, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--target", type=Path, required=True, help="Hugging Face checkpoint folder of the target")
    add("--draft", required=True, help="folder of the draft, or builtin:NAME")
    add_conventions(add)
    add("--num-positions", type=int, help="drafts of a round (3; all of a block)")
    add("--batch-size", type=int, default=8, help="sequences judged at once (8)")
    add("--seed", type=int, default=0, help="seed of prompts and replies (0)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the target's passes (bfloat16)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to generate and judge (cpu)")
    add("--json", type=Path, help="write the acceptance here too")
    add_corpus(parser.add_argument_group("replies").add_argument, num_prompts=200)
    return parser
