"""Read and check the command line of ``slime-spec draft convert`` before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from slime_spec.errors import ConfigError

PROG = "slime-spec draft convert"
LAYOUTS = ("sglang", "speculators")
DESCRIPTION = """\
Write a draft in another layout. It is read in SGLang's and SpecForge's, in its authors' (pytorch_model.bin
too) or in that of vLLM's speculators; every tensor is checked, and what was written is read back and compared."""


@dataclass(frozen=True)
class ConvertOptions:
    """Holds the options of the command; ``target_name`` is what the written config calls the target."""

    draft: Path
    target: Path
    out: Path
    layout: Literal["sglang", "speculators"]
    target_name: str | None


def read_convert_options(argv: Sequence[str]) -> ConvertOptions:
    """Read the options; raises ConfigError for a flag, a folder that is not there, or one that holds something."""
    given = _parser().parse_args(argv)
    for flag, folder in (("--draft", given.draft), ("--target", given.target)):
        if not (folder / "config.json").is_file():
            raise ConfigError(flag, "must be a checkpoint folder with a config.json", str(folder), "Pass its folder.")
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise ConfigError("--out", "must be new or empty", str(given.out), "Choose another folder.")
    return ConvertOptions(given.draft, given.target, given.out, given.to, given.target_name)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROG, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--draft", type=Path, required=True, help="folder of the draft")
    add("--target", type=Path, required=True, help="folder of the target that it drafts for")
    add("--out", type=Path, required=True, help="folder to write, new or empty")
    add("--to", choices=LAYOUTS, required=True, help="layout to write: sglang (SpecForge's too), or speculators (vLLM)")
    add("--target-name", help="what a config of speculators calls the target: a Hugging Face id (--target)")
    return parser


class _Parser(argparse.ArgumentParser):
    """Parses with argparse, whose complaints become ConfigErrors, as everywhere on this command line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(PROG, message, "", f"See {PROG} --help.")
