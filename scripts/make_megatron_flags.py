"""Write slime_spec/launch/slime/megatron_flags.json: the flags of a checkout of Megatron-LM, by its argparse groups.

git clone https://github.com/NVIDIA/Megatron-LM
PYTHONPATH=Megatron-LM python scripts/make_megatron_flags.py      (Python 3.12, with torch)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "slime_spec" / "launch" / "slime" / "megatron_flags.json"
# argparse's nargs -> how many values a flag has here.
NUM_VALUES = {None: "1", 0: "0", "?": "?", "*": "*", "+": "+"}


def flags_of(group: argparse._ArgumentGroup) -> dict[str, str]:
    """Return the group's flags, as they are written with hyphens, each with its number of values."""
    return {
        name.replace("_", "-"): NUM_VALUES.get(action.nargs, "+")
        for action in group._group_actions
        for name in action.option_strings
        if name.startswith("--") and name != "--help"
    }


def main() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    groups = {str(group.title): flags for group in parser._action_groups if (flags := flags_of(group))}
    lines = ",\n".join(f"{json.dumps(title)}: {json.dumps(groups[title])}" for title in sorted(groups))
    TABLE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
