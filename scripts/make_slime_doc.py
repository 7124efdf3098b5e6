"""Write the flag tables of docs/coming-from-slime.md from the code: ``python scripts/make_slime_doc.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slime_spec.config.schema import settings
from slime_spec.launch.flags import REFUSED, find_flag, is_flag
from slime_spec.launch.slime.model_shape import NAMES, NUMBERS
from slime_spec.launch.slime.notes import reason_of
from slime_spec.launch.slime.together import MEANINGS
from slime_spec.launch.slime.without_effect import WITHOUT_EFFECT
from slime_spec.sglang.flags import RENAMED, sglang_flags, sglang_version

DOC = Path(__file__).resolve().parent.parent / "docs" / "coming-from-slime.md"
BEGIN, END = "<!-- flags: scripts/make_slime_doc.py -->\n", "<!-- /flags -->"

# slime's arguments that set something here, besides --sglang-*; the code says what.
SLIMES = """
--adam-beta1 --adam-beta2 --advantage-estimator --apply-chat-template --apply-chat-template-kwargs --bf16
--calculate-per-token-loss --check-weight-update-equal --colocate --custom-generate-function-path
--custom-reward-post-process-path --custom-rm-path --custom-rollout-log-function-path --debug-rollout-only
--debug-train-only --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers
--disable-grpo-std-normalization --dynamic-sampling-filter-path --enable-mtp-training --entropy-coef --eps-clip
--eps-clip-c --eps-clip-high --eval-config --eval-input-key --eval-interval --eval-label-key --eval-max-prompt-len
--eval-max-response-len --eval-prompt-data --eval-reward-key --eval-temperature --eval-tool-key --eval-top-k
--eval-top-p --expert-model-parallel-size --expert-tensor-parallel-size --gamma --global-batch-size --group-rm
--hf-checkpoint --input-key --kl-coef --kl-loss-coef --kl-loss-type --label-key --load --load-debug-rollout-data
--loss-type --lr --lr-decay-style --lr-warmup-fraction --max-tokens-per-gpu --metadata-key --min-lr
--mtp-loss-scaling-factor --mtp-num-layers --n-samples-per-eval-prompt --n-samples-per-prompt --no-offload-rollout
--no-offload-train --normalize-advantages --num-epoch --num-gpus-per-node --num-rollout --num-steps-per-rollout
--offload-rollout --offload-train --optimizer-cpu-offload --over-sampling-batch-size --partial-rollout
--pipeline-model-parallel-size --prompt-data --recompute-granularity --reward-key --rm-type --rm-url
--rollout-batch-size --rollout-external-engine-addrs --rollout-function-path --rollout-max-context-len
--rollout-max-prompt-len --rollout-max-response-len --rollout-num-gpus-per-engine --rollout-sample-filter-path
--rollout-shuffle --rollout-stop --rollout-stop-token-ids --rollout-temperature --rollout-top-k --rollout-top-p --save
--save-debug-rollout-data --save-interval --seed --sglang-config --skip-eval-before-train --tensor-model-parallel-size
--tis-clip --tis-clip-low --tool-key --update-weight-buffer-size --update-weights-interval --use-distributed-optimizer
--use-kl-loss --use-rollout-routing-replay --use-tensorboard --use-tis --use-wandb --wandb-group --wandb-host
--wandb-mode --wandb-project --wandb-team --weight-decay
"""


def tables() -> str:
    """Return the tables as markdown."""
    parts = (_accepted(), _together(), _without_effect(), _refused(), _unknown())
    return "\n".join(line for part in parts for line in (*part, ""))


def _accepted() -> Iterator[str]:
    yield "### Accepted, with slime's meaning"
    yield ""
    yield "| flag | setting | default | meaning |"
    yield "|---|---|---|---|"
    for name in sorted(SLIMES.split()):
        if name in REFUSED or not is_flag(name) or name in WITHOUT_EFFECT:
            continue
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


def _unknown() -> Iterator[str]:
    unknown = [name for name in sorted(SLIMES.split()) if name not in REFUSED and not is_flag(name)]
    if unknown:
        yield "### Unknown here"
        yield ""
        yield ", ".join(f"`{name}`" for name in unknown)


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
