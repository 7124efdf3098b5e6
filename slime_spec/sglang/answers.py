"""An interpreter runs this script to report what it has: versions, model types and, with the word "flags", its flags.

``interpreter.py`` hands its text to the interpreter of the servers, whose Python may be older and has no slime_spec:
it imports the standard library alone. SGLang is imported only for its flags, because that takes seconds and may fail
for reasons outside this project. The answer is one line of JSON behind "SLIME_SPEC".
"""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def version_of(package: str) -> "str | None":
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def files(package: str, pattern: str) -> "list[Path]":
    spec = find_spec(package)
    return [path for root in (spec and spec.submodule_search_locations) or () for path in Path(root).glob(pattern)]


def model_types() -> "list[str]":
    found = {path.name for path in files("transformers", "models/*")}
    for path in files("sglang", "srt/configs/*.py"):
        found.update(re.findall(r'model_type = "([^"]+)"', path.read_text(errors="replace")))
    return sorted(found)


def server_flags() -> "list[dict[str, object]]":
    import argparse
    import gc

    gc.disable()  # a fifth of the import's time, and this process ends after it
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    return [
        {"dest": action.dest, "spellings": list(action.option_strings), "takes_value": action.nargs != 0}
        for action in parser._actions
    ]


def answer(with_flags: bool) -> "dict[str, object]":
    return {
        "sglang": version_of("sglang"),
        "torch": version_of("torch"),
        "router": version_of("sglang-router"),
        "model_types": model_types(),
        "flags": server_flags() if with_flags else [],
    }


if __name__ == "__main__":
    sys.stdout.write("SLIME_SPEC " + json.dumps(answer("flags" in sys.argv)) + "\n")
