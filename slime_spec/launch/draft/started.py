"""A draft's folder keeps the settings of its training, and a resumed command must have the same settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from slime_spec.errors import ConfigError
from slime_spec.files import read_json_object, write_whole
from slime_spec.launch.draft.options import DraftOptions

SETTINGS_FILE = "settings.json"
# Settings that may differ between a command and the command that resumes it.
FREE = ("target", "draft", "out", "corpus", "minutes", "resume", "draft_dtype", "device", "json")
# What a training did whose folder is older than a setting; other new settings are None then.
BEFORE = {"norm_output_convention": "sglang"}
FLAGS = {
    "norm_output_convention": "--draft-norm-output-convention",
    "tasks": "--task",
    "target_checksum": "--target",
    "draft_checksum": "--draft",
}


def check_started(options: DraftOptions, num_steps: int, target_checksum: str, draft_checksum: str | None) -> None:
    """Write the settings of a new folder, or compare a resumed command with the settings of its folder.

    Raises ConfigError naming the first flag that differs.
    """
    path, now = options.out / SETTINGS_FILE, _lasting(options, num_steps, target_checksum, draft_checksum)
    if not options.resume:
        options.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(now, indent=2) + "\n")
        return
    if not path.is_file():
        raise ConfigError(
            "--resume", f"needs a folder with the {SETTINGS_FILE} of its command", str(options.out), "Drop --resume."
        )
    started = read_json_object(path, remedy="Draw up the draft in another --out.")
    for name, value in now.items():
        if value != started.get(name, BEFORE.get(name)):
            raise ConfigError(
                FLAGS.get(name, f"--{name.replace('_', '-')}"),
                f"must be what {options.out} was started with ({started.get(name)!r})",
                value,
                "Pass the same settings, or another --out.",
            )


def _lasting(options: DraftOptions, num_steps: int, target_checksum: str, draft_checksum: str | None) -> dict[str, Any]:
    given = {name: value for name, value in vars(options).items() if name not in FREE}
    checksums = {"target_checksum": target_checksum, "draft_checksum": draft_checksum}
    settings = {**asdict(options.corpus), **given, "num_steps": num_steps, **checksums}
    loaded: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    return loaded
