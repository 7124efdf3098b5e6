"""This script runs a module with an API key among its arguments that no process list shows.

    SLIME_SPEC_SERVER_KEY=... python keyed.py sglang.launch_server --model-path DIR ...   # as python -m MODULE ...

It runs in the interpreter that has SGLang, and imports only the standard library. Only the same user can read the
environment of a process; its command line is for all to see.
"""

from __future__ import annotations

import os
import runpy
import sys

KEY_VARIABLE = "SLIME_SPEC_SERVER_KEY"

if __name__ == "__main__":
    _, module, *words = sys.argv
    sys.argv = [module, *words, "--api-key", os.environ[KEY_VARIABLE]]
    sys.path[0] = os.getcwd()  # as for python -m: this folder's modules are nobody's
    runpy.run_module(module, run_name="__main__", alter_sys=True)
