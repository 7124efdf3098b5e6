"""Write the flag tables of docs/coming-from-slime.md from the code: ``python scripts/make_slime_doc.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slime_spec.config.schema import settings
from slime_spec.launch.flags import REFUSED, find_flag
from slime_spec.launch.slime.model_shape import NAMES, NUMBERS
from slime_spec.launch.slime.together import MEANINGS
from slime_spec.launch.slime.without_effect import WITHOUT_EFFECT, reason_of
from slime_spec.sglang.flags import RENAMED, sglang_flags, sglang_version

DOC = Path(__file__).resolve().parent.parent / "docs" / "coming-from-slime.md"
BEGIN, END = "<!-- flags: scripts/make_slime_doc.py -->\n", "<!-- /flags -->"

# slime's arguments that set something here, besides --sglang-*; the code says what.
SLIMES = """
--adam-beta1 --adam-beta2 --apply-chat-template --bf16 --check-weight-update-equal --colocate --custom-rm-path
--debug-rollout-only --debug-train-only --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers
--disable-grpo-std-normalization --enable-mtp-training --eps-clip --eps-clip-high --expert-model-parallel-size
--expert-tensor-parallel-size --global-batch-size --hf-checkpoint --input-key --kl-loss-coef --label-key --load
--load-debug-rollout-data --lr --max-tokens-per-gpu --mtp-loss-scaling-factor --mtp-num-layers --n-samples-per-prompt
--no-offload-rollout --no-offload-train --num-gpus-per-node --num-rollout --offload-rollout --offload-train
--optimizer-cpu-offload --over-sampling-batch-size --partial-rollout --pipeline-model-parallel-size --prompt-data
--recompute-granularity --reward-key --rm-type --rollout-batch-size --rollout-external-engine-addrs
--rollout-max-prompt-len --rollout-max-response-len --rollout-num-gpus-per-engine --rollout-stop
--rollout-stop-token-ids --rollout-temperature --rollout-top-k --rollout-top-p --save --save-debug-rollout-data
--save-interval --seed --sglang-config --tensor-model-parallel-size --tool-key --update-weight-buffer-size
--update-weights-interval --use-distributed-optimizer --use-rollout-routing-replay --use-wandb --wandb-group
--wandb-host --wandb-mode --wandb-project --wandb-team --weight-decay
"""


def tables() -> str:
    """Return the tables as markdown."""
    return "\n".join([*_accepted(), "", *_together(), "", *_without_effect(), "", *_refused(), ""])


def _accepted() -> Iterator[str]:
    yield "### Accepted, with slime's meaning"
    yield ""
    yield "| flag | setting | default | meaning |"
    yield "|---|---|---|---|"
    for name in sorted(SLIMES.split()):
        flag, is_on = find_flag(name)
        setting = settings()[flag.path]
        path = flag.path
        if flag.num_values == "0":
            path += f"={_text(flag.on if is_on else flag.off)}"
        assert "|" not in setting.help, "a bar would end the table's cell"
        yield f"| `{name}` | `{path}` | {_shown(setting.default)} | {setting.help} |"
    every = f"Each of the {len(sglang_flags())} flags of SGLang {sglang_version()}, and names that it renamed: "
    every += ", ".join(f"`{name}`" for name in RENAMED)
    yield f"| `--sglang-<flag>` | `sglang.<flag>` | | {every}. |"


def _together() -> Iterator[str]:
    yield "### Mapped: they set something together with others"
    yield ""
    yield "| flag | what it sets |"
    yield "|---|---|"
    for name, meaning in sorted(MEANINGS.items()):
        yield f"| `{name}` | {meaning} |"


def _without_effect() -> Iterator[str]:
    yield "### Accepted without effect"
    yield ""
    yield "A note tells them at the launch. A value in brackets is the only one that is taken."
    yield ""
    yield "| because | flags |"
    yield "|---|---|"
    by_reason: dict[str, list[str]] = {}
    for name in (*WITHOUT_EFFECT, *sorted(NAMES)):
        values = WITHOUT_EFFECT[name].values if name in WITHOUT_EFFECT else ()
        by_reason.setdefault(reason_of(name), []).append(f"`{name}`" + (f" ({' or '.join(values)})" if values else ""))
    for reason, names in by_reason.items():
        yield f"| {reason} | {', '.join(sorted(names))} |"
    compared = ", ".join(f"`{name}`" for name in sorted(NUMBERS))
    yield ""
    yield f"Of the model's shape these are compared with `config.json`, and a contradiction is refused: {compared}."


def _refused() -> Iterator[str]:
    yield "### Refused, with a reason"
    yield ""
    yield "| why | what to do | flags |"
    yield "|---|---|---|"
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, told in REFUSED.items():
        by_reason.setdefault(told, []).append(f"`{name}`")
    for (why, remedy), names in by_reason.items():
        yield f"| {why} | {remedy} | {', '.join(sorted(names))} |"


def _shown(default: object) -> str:
    return "" if default is None or default == () else f"`{_text(default)}`"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_tables(document: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{tables()}{END}{after}"


if __name__ == "__main__":
    DOC.write_text(with_tables(DOC.read_text(encoding="utf-8")), encoding="utf-8")
