"""Write the tables of flags into docs/coming-from-slime.md, and docs/megatron-flags.md, from the code.

python scripts/make_slime_doc.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path

from slime_spec.config.schema import settings
from slime_spec.launch.compose import compose
from slime_spec.launch.flags import REFUSED, find_flag, flags, is_flag
from slime_spec.launch.slime.defaults import KEPT
from slime_spec.launch.slime.megatron import fates as all_fates
from slime_spec.launch.slime.megatron import num_values_of_megatron
from slime_spec.launch.slime.miles import REFUSED_OF_MILES
from slime_spec.launch.slime.model_shape import NAMES, NUMBERS
from slime_spec.launch.slime.notes import reason_of
from slime_spec.launch.slime.refused import REFUSED_OF_ROUTER
from slime_spec.launch.slime.together import MEANINGS
from slime_spec.launch.slime.without_effect import WITHOUT_EFFECT
from slime_spec.sglang.flags import RENAMED, sglang_flags, sglang_version

ROOT = Path(__file__).resolve().parent.parent
DOC, MEGATRON_DOC = ROOT / "docs" / "coming-from-slime.md", ROOT / "docs" / "megatron-flags.md"
BEGIN, END = "<!-- flags: scripts/make_slime_doc.py -->\n", "<!-- /flags -->"
# Every argument that slime itself defines, with its default; tests hold the command line to it.
ARGUMENTS = ROOT / "tests" / "config" / "arguments_of_slime.txt"
MEGATRON_HEAD = """\
# Megatron-LM's flags

slime passes all of Megatron-LM's flags on. Those that set something here, and those of slime's scripts, are in
[coming-from-slime.md](coming-from-slime.md#every-flag); every other is here.
`scripts/make_slime_doc.py` writes this page from `slime_spec/launch/slime/megatron.py`.
"""


def tables() -> str:
    """Return the tables as markdown."""
    of_miles = _refused("### Refused of miles and of sglang_router", {**REFUSED_OF_MILES, **REFUSED_OF_ROUTER})
    refused = _refused("### Refused, with a reason", REFUSED)
    parts = (_defaults(), _accepted(), _together(), _without_effect(), refused, of_miles)
    return "\n".join(line for part in parts for line in (*part, ""))


def megatron_page() -> str:
    """Return docs/megatron-flags.md."""
    others = [name for name in num_values_of_megatron() if name not in REFUSED and not _sets_a_setting(name)]
    fates = {name: fate for name, fate in all_fates().items() if name in others and name not in flags()}
    none = {name: (fate.reason, "") for name, fate in fates.items() if fate.remedy is None}
    refused = {name: (fate.reason, fate.remedy) for name, fate in fates.items() if fate.remedy is not None}
    parts = (_by_reason("## Accepted without effect", none), _by_reason("## Refused, with a reason", refused))
    return "\n".join((MEGATRON_HEAD, *(line for part in parts for line in (*part, "")))).rstrip() + "\n"


def _sets_a_setting(name: str) -> bool:
    return is_flag(name) and find_flag(name)[0].path in settings()


def _by_reason(title: str, told: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    yield title
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, reason in told.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    for (why, remedy), names in by_reason.items():
        yield ""
        yield f"**{why[0].upper()}{why[1:]}.** {remedy}".rstrip()
        yield ", ".join(sorted(names))


def _defaults() -> Iterator[str]:
    yield "### Defaults that stay different"
    yield ""
    yield "`--config slime` has slime's defaults, but for these:"
    yield ""
    yield "| flag | here | because |"
    yield "|---|---|---|"
    needed = ["--prompt-data", "prompts.jsonl", "--n-samples-per-prompt", "2"]
    preset = compose(["--config", "slime", *needed])
    for name, why in KEPT.items():
        yield f"| `{name}` | {_shown(attrgetter(find_flag(name)[0].path)(preset))} | {why} |"


def _accepted() -> Iterator[str]:
    yield "### Accepted, with slime's meaning"
    yield ""
    yield "| flag | setting | default | meaning |"
    yield "|---|---|---|---|"
    slimes = [line.split()[0] for line in ARGUMENTS.read_text(encoding="utf-8").splitlines()]
    for name in sorted({*slimes, *num_values_of_megatron()}):
        if not _sets_a_setting(name):
            continue
        flag, is_on = find_flag(name)
        setting = settings()[flag.path]
        path = flag.path
        if flag.num_values == "0":
            path += f"={_text(flag.on if is_on else flag.off)}"
        assert "|" not in setting.help, "a bar would end the table's cell"
        yield f"| `{name}` | `{path}` | {_shown(setting.default)} | {setting.help} |"
    every = f"Each of the {len(sglang_flags())} flags of SGLang {sglang_version()}, and names that it renamed: "
    every += ", ".join(f"`{name}`" for name in RENAMED)
    yield f"| `--sglang-<flag>` | `sglang.<flag>` | | {every}. |"


def _together() -> Iterator[str]:
    yield "### Mapped: they set something together with others"
    yield ""
    yield "| flag | what it sets |"
    yield "|---|---|"
    for name, meaning in sorted(MEANINGS.items()):
        yield f"| `{name}` | {meaning} |"


def _without_effect() -> Iterator[str]:
    yield "### Accepted without effect"
    yield ""
    yield "A note tells them at the launch. A value in brackets is the only one that is taken."
    yield ""
    yield "| because | flags |"
    yield "|---|---|"
    by_reason: dict[str, list[str]] = {}
    for name in (*WITHOUT_EFFECT, *sorted(NAMES)):
        values = WITHOUT_EFFECT[name].values if name in WITHOUT_EFFECT else ()
        by_reason.setdefault(reason_of(name), []).append(f"`{name}`" + (f" ({' or '.join(values)})" if values else ""))
    for reason, names in by_reason.items():
        yield f"| {reason} | {', '.join(sorted(names))} |"
    compared = ", ".join(f"`{name}`" for name in sorted(NUMBERS))
    yield ""
    yield f"Of the model's shape these are compared with `config.json`, and a contradiction is refused: {compared}."


def _refused(title: str, table: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    yield title
    yield ""
    yield "| why | what to do | flags |"
    yield "|---|---|---|"
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, told in table.items():
        by_reason.setdefault(told, []).append(f"`{name}`")
    for (why, remedy), names in by_reason.items():
        yield f"| {why} | {remedy} | {', '.join(sorted(names))} |"


def _shown(default: object) -> str:
    return "" if default is None or default == () else f"`{_text(default)}`"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_tables(document: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{tables()}{END}{after}"


if __name__ == "__main__":
    DOC.write_text(with_tables(DOC.read_text(encoding="utf-8")), encoding="utf-8")
    MEGATRON_DOC.write_text(megatron_page(), encoding="utf-8")
