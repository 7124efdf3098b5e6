"""Starts an SGLang server as slime does: ServerArgs from a dictionary, launch_server in a spawned process.

    python launched_by_slime.py '{"model_path": ..., "port": ...}'

slime loads no plug-ins before it makes the arguments, and SGLang's processes load theirs themselves.
"""

import json
import multiprocessing
import sys
from typing import Any


def on_this_cpu(server_args: Any) -> None:
    """SGLang chooses the attention backend before it loads plug-ins: what the CPU stands in for comes first."""
    import sglang_cpu_platform

    sglang_cpu_platform.activate()
    from sglang.srt.entrypoints.http_server import launch_server

    launch_server(server_args)


if __name__ == "__main__":
    from sglang.srt.server_args import ServerArgs

    multiprocessing.set_start_method("spawn", force=True)
    server = multiprocessing.Process(target=on_this_cpu, args=(ServerArgs(**json.loads(sys.argv[1])),))
    server.start()
    server.join()
    sys.exit(server.exitcode)
