"""Write slime_spec/sglang/flags.json: every command line flag of the installed SGLang's ServerArgs.

Run it in an environment with the pinned SGLang (its ServerArgs needs no GPU and few of its requirements):

    pip install torch && pip install --no-deps sglang==0.5.21
    pip install numpy orjson psutil pybase64 requests triton packaging pillow starlette msgspec pydantic pyzmq tqdm
    pip install IPython aiohttp
    python scripts/make_sglang_flags.py
"""

from __future__ import annotations

import argparse
import json
import re
from importlib.metadata import version
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "slime_spec" / "sglang" / "flags.json"

# SGLang's own argparse types, by the name of their function; all its JSON readers accept one JSON text.
TYPES = {
    None: "str",
    "str": "str",
    "nullable_str": "str",
    "int": "int",
    "human_readable_int": "suffixed_int",
    "float": "float",
    "loads": "json",
    "json_list_type": "json",
    "parse_cuda_graph_config_arg": "json",
}


def row(action: argparse.Action) -> dict[str, object]:
    """Return one flag as plain data; ``type`` is bool exactly where the flag takes no value."""
    is_switch = action.nargs == 0
    entry: dict[str, object] = {
        "dest": action.dest,
        "flags": [name for name in action.option_strings if not name.startswith("--no-")],
        "type": "bool" if is_switch else TYPES[getattr(action.type, "__name__", None)],
    }
    if not is_switch and action.nargs is not None:
        entry["nargs"] = action.nargs
    if action.choices is not None:
        # SGLang keeps some choices in sets, whose order changes from run to run.
        entry["choices"] = sorted(action.choices) if isinstance(action.choices, set) else list(action.choices)
    if action.default is not None:
        entry["default"] = action.default
    entry["help"] = "" if action.help in (None, argparse.SUPPRESS) else first_sentence(str(action.help))
    return entry


def first_sentence(text: str) -> str:
    """Return the first sentence on one line; an abbreviation does not end it, and "Deprecated." takes the next."""
    sentences = re.split(r"(?<=[a-z0-9)'\"])(?<!e\.g)(?<!i\.e)(?<!Deprecated)\.(?=\s)", " ".join(text.split()))
    return sentences[0].removesuffix(".") + "."


def main() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    rows = [row(action) for action in parser._actions]
    lines = ",\n".join(json.dumps(entry) for entry in sorted(rows, key=lambda entry: str(entry["dest"])))
    TABLE.write_text(f'{{"sglang": "{version("sglang")}", "flags": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
