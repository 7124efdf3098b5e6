"""Defaults of slime that --config slime leaves as this project has them, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

_NEEDED = "slime has no default and needs the flag; here a small run works without"
KEPT: Mapping[str, str] = {
    "--hf-checkpoint": _NEEDED,
    "--num-rollout": _NEEDED,
    "--rollout-batch-size": _NEEDED,
    "--rollout-max-response-len": "slime leaves the bound to SGLang; here it is 64 tokens: pass what your replies need",
    "--rollout-max-prompt-len": "slime has no bound; here the longest sequence is known before the start (2,048)",
    "--max-tokens-per-gpu": "slime has none and then takes single samples; here microbatches are always packed",
    "--label-key": "slime reads no label; here the key label is read where a row has it",
    "--rm-type": "slime has none and ends without a reward; here it is last_integer, so pass your own",
    "--custom-rm-path": "as --rm-type",
    "--check-weight-update-equal": "slime does not compare; here every push is read back and compared",
    "--mtp-loss-scaling-factor": "slime has 0.2 beside the policy's loss; here a draft has an optimizer of its own, "
    "whose steps do not depend on it where nothing is clipped",
    "--offload": "slime offloads nothing unless asked or colocated; here only a colocated run does",
    "--offload-train": "as --offload",
    "--offload-rollout": "as --offload",
    "--wandb-project": "slime has none; wandb's own default would be the folder's name",
    "--seed": "slime has 1234 for weights that nobody draws here, and 42 for prompts (--rollout-seed), which is ours",
    "--rollout-health-check-interval": "slime has 30 s and generates a token; here a process is asked (10 s)",
    "--rollout-health-check-timeout": "slime has 30 s; here a busy machine is no hang (120 s)",
}
