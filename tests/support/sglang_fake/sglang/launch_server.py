"""The fake server under the real one's name; a round takes SGLANG_FAKE_DELAY_S seconds.

SGLANG_FAKE_SCRIPT names a file that says how it behaves by algorithm, as the fake's --script does.

Of an engine of several nodes the processes find each other as SGLang's do: the first serves when all others have come
to its --dist-init-addr, and only the first does.
"""

import argparse
import os
import socket
import sys
import threading
import time

from rollout.sglang_engine.fake import main


def rendezvous(num_nodes: int, rank: int, address: str) -> list[socket.socket]:
    """The connections to the other nodes; returns once all are there."""
    host, _, port = address.rpartition(":")
    if rank > 0:
        while True:
            try:
                return [socket.create_connection((host, int(port)))]
            except ConnectionRefusedError:
                time.sleep(0.05)
    with socket.create_server((host, int(port))) as listening:
        return [listening.accept()[0] for _ in range(num_nodes - 1)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--dist-init-addr")
    own, _ = parser.parse_known_args()
    if own.nnodes > 1:
        others = rendezvous(own.nnodes, own.node_rank, own.dist_init_addr)
        sys.stdout.write(f"met {len(others)} as node {own.node_rank}\n")
        sys.stdout.flush()
    if own.node_rank > 0:
        threading.Event().wait()
    sys.stdout.write(f"server_args={sys.argv[1:]}\n")  # SGLang logs them too, its key among them
    sys.stdout.flush()
    script = os.environ.get("SGLANG_FAKE_SCRIPT")
    words = ["--delay-s", os.environ.get("SGLANG_FAKE_DELAY_S", "0.005"), *(["--script", script] if script else [])]
    main([*sys.argv[1:], *words])
