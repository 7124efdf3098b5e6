"""This module writes docs/doctor.md: the command, its JSON, and every check with the reason for it."""

from __future__ import annotations

from itertools import groupby

from slime_spec.preflight.checks import TRAPS
from slime_spec.preflight.finding import Trap

INTRODUCTION = """\
# Preflight

Written by `python scripts/make_doctor_doc.py` from `slime_spec/preflight`.

The doctor, `--dry-run` and the launch itself make the same checks, on either engine, and report together all that
stands in the way: an error stops the launch before anything is started, a warning is logged in one line,
`--skip-check ID` takes a risk. Every file that the run reads is read: checkpoints with all their weights, tokenizer and
chat template, prompts and rewards, saved rollouts, the run's folder; one that is refused has the id `configuration` and
cannot be skipped. Only the start itself can know whether ports are free, a cluster answers, servers stay healthy.

Checks of SGLang's
servers look at what each engine's command line will be, with `--sglang-config` and `--sglang-extra-args` applied, and
at the version in `--sglang-python`; where there is none, they speak of the pinned version. Servers that someone else
started (`--rollout-external-engine-addrs`) are asked for their version and flags, judged by the answer, and refused
where a flag would give other samples than the run asks for.

What is said of versions was read in the wheels of those versions, or is the report of the issue it links to.

What speculation pays with a checkpoint, drafts and prompts is measured by `slime-spec tune`
([choosing-and-tuning.md](choosing-and-tuning.md)).

A `--fix` is never applied by itself. Its flags are those of errors and warnings that a flag can mend; a test adds them
for every check and looks again.
"""
JSON = """\
## JSON

| key | value |
|---|---|
| `sglang` | the version that was judged; null where the run has no SGLang |
| `num_checks` | how many checks there are |
| `error`, `warning`, `info` | how many findings of each severity |
| `skipped` | what `--skip-check` names |
| `fix` | the flags to add, as a list of words |
| `findings` | a list of objects with the keys below |

| key of a finding | value |
|---|---|
| `id` | the check's, for `--skip-check`; `configuration` where a flag, or a file that it names, was refused |
| `severity` | `error`, `warning` or `info` |
| `read` | what was seen, with the values |
| `why` | why it matters |
| `remedy` | what to do |
| `fix` | flags that do it, as a list of words; empty where no flag can |
| `links` | where it is reported or documented |
"""


def markdown(usage: str) -> str:
    """Return the text of docs/doctor.md; ``usage`` is the command's usage text."""
    parts = [INTRODUCTION, f"```text\n{usage}\n```\n", JSON, "## Checks"]
    for module, traps in groupby(TRAPS, key=lambda trap: trap.look.__module__):
        parts.append(f"\n### {module.rpartition('.')[2]}\n")
        parts += [_row(trap) for trap in traps]
    return "\n".join(parts) + "\n"


def _row(trap: Trap) -> str:
    links = " ".join(f"[{_name(link)}]({link})" for link in trap.links)
    return f"- **{trap.id}**: {trap.why} {links}"


def _name(link: str) -> str:
    number = link.rpartition("/")[2]
    return f"#{number}" if number.isdigit() else "documentation"
