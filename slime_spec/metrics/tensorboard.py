"""TensorBoardSink alone imports the package ``tensorboard``; each metric is a scalar at its step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime_spec.config.build import to_yaml
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError

FOLDER = "tensorboard"
CONFIG_TAG = "config"


class TensorBoardSink:
    """Implements MetricSink. A resumed run goes on in the folder, and says where: readers drop what it writes again."""

    def __init__(self, folder: Path, config_yaml: str) -> None:
        writer = event_writer()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = writer(str(folder))
        except OSError as error:
            rule = f"must be a folder that can be written: {error.strerror or error}"
            raise ConfigError("metrics.tensorboard_dir", rule, str(folder), "Pass another --tensorboard-dir.") from None
        self._config_yaml = config_yaml
        self._has_begun = False

    @classmethod
    def open(cls, config: Config, folder: Path) -> TensorBoardSink:
        return cls(Path(config.metrics.tensorboard_dir or folder / FOLDER), to_yaml(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not self._has_begun:
            self._has_begun = True
            self._add(step, session_log=SessionLog(status=SessionLog.START))
            self._add(step, summary=_text(CONFIG_TAG, self._config_yaml))
        scalars = [Summary.Value(tag=name, simple_value=_single(value)) for name, value in values.items()]
        self._add(step, summary=Summary(value=scalars))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **what))


def event_writer() -> Any:
    """Return the package's class that writes event files; raises ConfigError where the package is not installed."""
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ModuleNotFoundError as error:
        rule = f"needs the package tensorboard, which is not installed ({error.name})"
        remedy = "pip install 'slime_spec[tensorboard]', or leave --use-tensorboard out."
        raise ConfigError("metrics.use_tensorboard", rule, True, remedy) from None
    return EventFileWriter


def _text(tag: str, text: str) -> Any:
    """Return a summary that TensorBoard shows among its texts, as it stands."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's code
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    value = Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=TensorProto(dtype="DT_STRING", string_val=[indented.encode()], tensor_shape={"dim": [{"size": 1}]}),
    )
    return Summary(value=[value])


def _single(value: float) -> float:
    """Return a value that single precision holds: one beyond it is infinite there."""
    return value if abs(value) < 3.4e38 else math.copysign(math.inf, value) if value == value else math.nan
