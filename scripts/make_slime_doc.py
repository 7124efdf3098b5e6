"""Write the flag tables of docs/coming-from-slime.md from the code: ``python scripts/make_slime_doc.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from slime_spec.config.schema import settings
from slime_spec.errors import ConfigError
from slime_spec.launch.flags import ONE_VALUE, REFUSED, WHY_ONE_VALUE, find_flag
from slime_spec.sglang.flags import sglang_flags, sglang_version

DOC = Path(__file__).resolve().parent.parent / "docs" / "coming-from-slime.md"
BEGIN, END = "<!-- flags: scripts/make_slime_doc.py -->\n", "<!-- /flags -->"

# What slime's launch scripts and examples pass, besides --sglang-*; the code says which of them are accepted.
SLIMES = """
--actor-num-gpus-per-node --actor-num-nodes --adam-beta1 --adam-beta2 --advantage-estimator --apply-chat-template
--colocate --context-parallel-size --custom-rm-path --debug-rollout-only
--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --debug-train-only --enable-mtp-training
--eps-clip --eps-clip-high --expert-model-parallel-size --expert-tensor-parallel-size --global-batch-size
--hf-checkpoint --input-key --kl-loss-coef --label-key --load --lr --max-tokens-per-gpu --mtp-loss-scaling-factor
--mtp-num-layers --n-samples-per-prompt --no-offload-rollout --no-offload-train --num-rollout
--offload-rollout --offload-train
--optimizer-cpu-offload
--over-sampling-batch-size --partial-rollout --pipeline-model-parallel-size --prompt-data --rm-type
--rollout-batch-size --rollout-external-engine-addrs --rollout-max-response-len --rollout-num-gpus
--rollout-num-gpus-per-engine --rollout-stop --rollout-stop-token-ids --rollout-temperature --rollout-top-k
--rollout-top-p --save --save-debug-rollout-data --save-interval --sglang-config --load-debug-rollout-data
--tensor-model-parallel-size --train-backend --update-weight-buffer-size --update-weight-transport
--update-weights-interval --use-distributed-optimizer --use-kl-loss --use-tensorboard --use-wandb --wandb-group
--wandb-host --wandb-project --wandb-team
--weight-decay --num-gpus-per-node
--custom-generate-function-path --custom-reward-post-process-path --custom-rollout-log-function-path
--dynamic-sampling-filter-path --rollout-function-path --rollout-max-context-len --rollout-sample-filter-path
--eval-prompt-data --eval-interval --eval-max-response-len --eval-max-prompt-len --eval-top-p --eval-top-k
--eval-temperature --n-samples-per-eval-prompt --eval-config --eval-input-key --eval-label-key --eval-tool-key
--eval-reward-key --skip-eval-before-train
--disable-grpo-std-normalization --check-weight-update-equal --seed --use-rollout-routing-replay
"""
# Remedy -> the flags of slime that are unknown here.
UNKNOWN: Mapping[str, str] = {
    "Leave it out: the shape of the model is read from `config.json`.": """
--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --num-query-groups --group-query-attention
--kv-channels
--vocab-size --normalization --norm-epsilon --position-embedding-type --rotary-base --rotary-percent --swiglu
--disable-bias-linear --qk-layernorm --untie-embeddings-and-output-weights --num-experts --moe-ffn-hidden-size
--moe-layer-freq --moe-router-topk --moe-router-score-function --model-name""",
    "Leave it out: the reference is `--hf-checkpoint` itself, and nothing is converted first.": "--ref-load",
    "Leave it out: prompts of a file are shuffled every epoch by `--seed`.": "--rollout-shuffle",
    "Leave it out: microbatches are always packed by tokens; `--max-tokens-per-gpu` bounds them.": """
--use-dynamic-batch-size --micro-batch-size --balance-data --data-pad-size-multiplier""",
    "Leave it out: it is always so (AdamW, constant rate after warm-up, no dropout, loss per token, k3 KL).": """
--optimizer --lr-decay-style --min-lr --attention-dropout --hidden-dropout --calculate-per-token-loss --kl-loss-type""",
    "Leave it out: the importance ratio is always against the rollout's own logprobs.": """
--use-rollout-logprobs --use-routing-replay --use-tis --tis-clip --tis-clip-low""",
    "Leave it out: these details of Megatron-Core are no settings here.": """
--accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --attention-backend --no-gradient-accumulation-fusion
--no-check-for-nan-in-loss-and-grad --deterministic-mode --log-probs-chunk-size""",
    "Set `WANDB_API_KEY`.": "--wandb-key",
    "Leave it out: a run has the name that `--run-name` gives it.": "--disable-wandb-random-suffix",
    "Write a task (`--task module:attribute`) or a reward (`--custom-rm-path module:function`).": """
--rm-url --metadata-key --multimodal-keys""",
    "Pass `--recompute-activations`; how is not a choice here.": """
--recompute-granularity --recompute-method --recompute-num-layers""",
    "Pass `--global-batch-size` alone.": "--num-steps-per-rollout",
    "Pass `--ray-address` to join a cluster; this project submits no Ray job.": "--runtime-env-json",
    "Not in this version: objectives and filters beyond GRPO.": """
--entropy-coef --kl-coef --dynamic-sampling-filter-path --use-opd --loss-type
--disable-compute-advantages-and-returns""",
    "Not in this version: these ways to spare the trainer's memory or time.": """
--sequence-parallel --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer
--moe-token-dispatcher-type --moe-enable-deepep""",
}


def tables() -> str:
    """Return the three tables as markdown; raises AssertionError if a flag is in the wrong table."""
    return "\n".join([*_accepted(), "", *_refused(), "", *_unknown(), ""])


def _accepted() -> Iterator[str]:
    yield "### Accepted"
    yield ""
    yield "| flag | setting | default | meaning |"
    yield "|---|---|---|---|"
    for name in sorted(SLIMES.split()):
        if name in REFUSED or not _is_known(name):
            continue
        if name in ONE_VALUE:
            why = WHY_ONE_VALUE.get(name, ("", ""))[0]
            told = f"The one choice here: accepted; any other value is refused{why}."
            yield f"| `{name}` | | {ONE_VALUE[name]} | {told} |"
            continue
        flag, is_on = find_flag(name)
        setting = settings()[flag.path]
        path = flag.path
        if flag.num_values == "0":
            path += f"={_text(flag.on if is_on else flag.off)}"
        assert "|" not in setting.help, "a bar would end the table's cell"
        yield f"| `{name}` | `{path}` | {_shown(setting.default)} | {setting.help} |"
    every = f"Each of the {len(sglang_flags())} flags of SGLang {sglang_version()}."
    yield f"| `--sglang-<flag>` | `sglang.<flag>` | | {every} |"


def _refused() -> Iterator[str]:
    yield "### Refused, with a reason"
    yield ""
    yield "| flag | why | what to do |"
    yield "|---|---|---|"
    for name in sorted(REFUSED):
        why, remedy = REFUSED[name]
        yield f"| `{name}` | {why} | {remedy} |"


def _unknown() -> Iterator[str]:
    yield "### Unknown here"
    yield ""
    yield "| what to do | flags |"
    yield "|---|---|"
    for advice, names in UNKNOWN.items():
        known = [name for name in names.split() if _is_known(name)]
        assert not known, f"these flags are accepted, and the table says that they are unknown: {known}"
        yield f"| {advice} | {' '.join(f'`{name}`' for name in names.split())} |"
    gone = [name for name in sorted(SLIMES.split()) if name not in REFUSED and not _is_known(name)]
    if gone:
        yield f"| Leave it out: there is one choice. | {' '.join(f'`{name}`' for name in gone)} |"


def _is_known(name: str) -> bool:
    try:
        find_flag(name)
    except ConfigError:
        return False
    return True


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
