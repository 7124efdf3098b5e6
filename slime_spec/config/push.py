"""These settings say how weights go from the trainer to the engines."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import INT32, setting


@dataclass(frozen=True)
class PushConfig:
    """Holds the settings of ``push``."""

    interval: int = setting(
        1, "Push weights every this many steps.", flags=("--update-weights-interval",), minimum=1, maximum=INT32
    )
    transport: str = setting(
        "auto",
        "How weights reach the engines, or the SGLang servers behind them: ipc (they map the trainer's memory: on the "
        "same GPU, or on the CPU of one machine), collective (broadcast from the trainer's ranks: nccl between GPUs, "
        "gloo between CPUs), object_store (Ray's, through the host and to servers as --sglang-weight-transport says), "
        "or auto: ipc where they share GPUs, collective between GPUs, else object_store.",
        flags=("--push-transport",),
        choices=("auto", "object_store", "ipc", "collective"),
    )
    bucket_bytes: int = setting(
        128 * 1024 * 1024,
        "Bytes per bucket. By ipc on a GPU each bucket costs milliseconds, as two processes take turns: an 8B model "
        "takes 0.5 s in buckets of 128 MiB and 0.13 s in buckets of 2 GiB, of which the GPU then holds two.",
        flags=("--update-weight-buffer-size",),
        minimum=1,
        maximum=2**40,
    )
    verify: bool = setting(
        True,
        "After each push, read back the weights every engine computes with and compare their checksum.",
        flags=("--check-weight-update-equal",),
    )
    pause_mode: str = setting(
        "none",
        "What engines do with running requests during a push: none (go on), retract (recompute their KV with the new "
        "weights), in_place (keep it) or abort.",
        flags=("--update-weights-pause-mode",),
        choices=("none", "retract", "in_place", "abort"),
    )
