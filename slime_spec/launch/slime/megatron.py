"""Every flag of Megatron-LM that has no meaning of its own here is known, and told what becomes of it.

megatron_flags.json lists the flags by the groups of Megatron's own help (scripts/make_megatron_flags.py writes it). A
flag's fate is that of a row that names it, else that of the row that names its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from slime_spec.files import read_json_object
from slime_spec.launch.slime.without_effect import CONFIG_JSON, KERNELS, WithoutEffect

TABLE = Path(__file__).with_name("megatron_flags.json")
_LEAVE = "Leave it out."
_SETTINGS = (
    "the trainer builds Megatron-Core's model and optimizer from this project's settings, which have no such choice",
    "Leave it out; `slime-spec train --help` lists the settings of the trainer.",
)


@dataclass(frozen=True)
class Fate:
    """Says why a flag changes nothing, or with a ``remedy`` why it is refused; and which flags and groups that are.

    Example: ``Fate("updates are AdamW's", "Leave it out.", groups="regularization")``
    """

    reason: str
    remedy: str | None = None
    names: str = ""
    groups: str = ""

    @property
    def titles(self) -> tuple[str, ...]:
        return tuple(filter(None, (line.strip() for line in self.groups.split(","))))


FATES: tuple[Fate, ...] = (
    Fate(
        KERNELS,
        names="""
            --tp-comm-overlap --no-tp-comm-bulk-wgrad --disable-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad
            --disable-tp-comm-bulk-dgrad --no-tp-comm-overlap-ag --disable-tp-comm-overlap-ag --no-tp-comm-overlap-rs
            --disable-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad --no-tp-comm-split-ag --disable-tp-comm-split-ag
            --no-tp-comm-split-rs --disable-tp-comm-split-rs --tp-comm-bootstrap-backend --tp-comm-overlap-cfg
            --cross-entropy-loss-fusion --cross-entropy-fusion-impl --overlap-moe-expert-parallel-comm
            --delay-wgrad-compute --overlap-dispatch-backward-with-experts-wgrad --ep-overlap-early-attn-memory-release
            --use-ring-exchange-p2p --defer-embedding-wgrad-compute --wgrad-deferral-limit
            --overlap-p2p-communication-warmup-flush --microbatch-group-size-per-virtual-pipeline-stage
            --pipeline-model-parallel-comm-backend --num-layers-per-virtual-pipeline-stage
            --num-virtual-stages-per-pipeline-rank --no-overlap-p2p-communication --flash-attention-version
            --cpu-offloading-num-layers --cpu-offloading-retain-pinned-cpu-buffers --distribute-saved-activations
            --recompute-modules --moe-layer-recompute --checkpoint-activations --fine-grained-activation-offloading
            --offload-modules --min-offloaded-tensor-size --delay-offload-until-cuda-graph
            --delta-offload-bytes-across-pp-ranks --activation-offload-fraction
            --fine-grained-offloading-max-inflight-offloads --high-priority-a2a-comm-stream
            --moe-shared-expert-overlap --use-grouped-gemm-for-shared-expert
            --use-grouped-gemm-for-dense-mlp --moe-use-grouped-tensor --moe-single-grouped-weight
            --moe-single-grouped-bias --moe-flex-dispatcher-backend --moe-permute-fusion-into-hybridep
            --moe-hybridep-pad-uneven-dispatch-inputs --moe-router-fusion --moe-flex-dispatcher-num-sms
            --moe-deepep-num-sms --moe-hybridep-num-sms --moe-hybridep-num-blocks-permute
            --moe-hybridep-num-blocks-unpermute --moe-hybridep-num-sms-preprocessing --moe-ncclep-zero-copy
            --moe-router-padding-for-quantization --moe-router-padding-for-fp8 --moe-paged-stash
            --moe-paged-stash-page-size --moe-paged-stash-buffer-size-factor-cuda
            --moe-paged-stash-buffer-size-factor-cpu --enable-cuda-graph --cuda-graph-warmup-steps
            --external-cuda-graph --cuda-graph-impl --cuda-graph-scope --cuda-graph-modules --use-te-activation-func
            --use-transformer-engine-op-fuser --fused-residual-rmsnorm --use-fused-weighted-squared-relu
            --symmetric-ar-type --dsa-kernel-backend --disable-mamba-mem-eff-path --gdp-cutedsl-kernel
            --gdp-num-chunk-states-to-recompute --mlp-chunks-for-training --no-clone-scatter-output-in-embedding
            --disable-clone-scatter-output-in-embedding --empty-unused-memory-level --manual-gc --manual-gc-interval
            --no-manual-gc-eval --disable-manual-gc-eval --train-sync-interval --no-bias-gelu-fusion
            --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-persist-layer-norm --use-flash-attn --use-mcore-models
            --optimizer-cuda-graph --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload
            --no-pin-cpu-grads --no-pin-cpu-params --cache-mla-latents --mla-down-proj-fusion --mhc-recompute-layer-num
            --gtp-remat-opt-in-modules --overlap-grad-reduce --ddp-num-buckets --ddp-bucket-size
            --ddp-pad-buckets-for-high-nccl-busbw --ddp-average-in-collective --overlap-param-gather
            --overlap-param-gather-with-optimizer-step --no-align-param-gather --no-align-grad-reduce
            --disable-align-grad-reduce --use-nccl-ub --disable-symmetric-registration --gtp-remat-nccl-ub
            --gtp-expert-remat-nccl-ub --fsdp-manual-registration --create-all-gather-group
            --no-gradient-reduce-div-fusion --num-distributed-optimizer-instances --no-use-layer-wise-param-layout
            --use-sharp --sharp-enabled-group --high-priority-stream-groups --nccl-communicator-config-path
            --use-tp-pp-dp-mapping --disable-gloo-process-groups --disable-jit-fuser --lazy-mpu-init --cp-comm-type
            --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
            --distributed-timeout-seconds-after-init""",
    ),
    Fate(
        CONFIG_JSON,
        groups="network size, mla, moe, heterogeneous architecture, experimental_attention_variant",
        names="""
            --softmax-type --glu-linear-offset --activation-func-clamp-value --qk-l2-norm
            --experimental-attention-variant --dsa-indexer-n-heads --dsa-indexer-head-dim --dsa-indexer-topk
            --dsa-indexer-topk-freq --dsa-indexer-skip-topk-offset --dsa-indexer-rope-interleaved
            --no-dsa-indexer-rotate-activation
            --disable-dsa-indexer-rotate-activation --no-dsa-indexer-scoring-relu --disable-dsa-indexer-scoring-relu
            --dsa-indexer-k-norm-epsilon --dsa-indexer-k-norm-fp32 --linear-conv-kernel-dim --linear-key-head-dim
            --linear-value-head-dim --linear-num-key-heads --linear-num-value-heads --moe-latent-size
            --moe-apply-probs-on-input --moe-shared-expert-glu-interleave-size --moe-mlp-glu-interleave-size
            --mrope-section --is-hybrid-model --mamba-state-dim --mamba-head-dim --mamba-num-groups --mamba-num-heads
            --gdp-num-householder --hybrid-layer-pattern --hybrid-override-pattern --mtp-hybrid-override-pattern
            --mtp-use-repeated-layer --enable-mhc-connections --mhc-num-residual-streams --mhc-sinkhorn-iterations
            --apply-residual-connection-post-layernorm --no-pad-vocab-size --disable-pad-vocab-size --rope-type""",
    ),
    Fate(
        "weights begin as the checkpoint has them",
        names="""
            --init-method-std --embedding-init-method-std --init-method-xavier-uniform --mhc-init-gating-factor
            --use-cpu-initialization --no-initialization --init-model-with-meta-device""",
    ),
    Fate("a signal ends a run in order, after its step", names="--exit-signal-handler"),
    Fate(
        "the run logs its own metrics, every step (docs/metrics.md)",
        groups="logging, one logger, straggler, opentelemetry, workload inspector",
    ),
    Fate("wandb's entity has another flag here", "Pass --wandb-team NAME.", names="--wandb-entity"),
    Fate(
        "wandb's names and files are the run's",
        "Leave it out; --run-name and --output-dir name the run and its folder.",
        names="--wandb-exp-name --wandb-save-dir",
    ),
    Fate(
        "a checkpoint is written in one form, whole before the next step begins",
        groups="checkpointing, autoresume, msc",
    ),
    Fate(
        "--load resumes a whole run, with its optimizer, its random numbers and its step",
        "Leave it out; pass the weights alone as --hf-checkpoint to begin at step 0.",
        names="""
            --finetune --no-load-optim --no-load-rng --pretrained-checkpoint --ckpt-step --load-main-params-from-ckpt
            --override-ckpt-iteration --no-save-rng --use-checkpoint-args --use-mp-args-from-checkpoint-args
            --exit-on-missing-checkpoint --ckpt-convert-format --ckpt-convert-save
            --ckpt-convert-update-legacy-dist-opt-format""",
    ),
    Fate(
        "checkpoints are those of --save-interval",
        "Leave it out; --save-interval N, and --save-debug-rollout-data for samples.",
        names="""
            --persistent-save-interval --save-params-interval --save-activations-interval
            --save-tokens-per-expert-interval --save-wgrads-interval --save-dgrads-interval --save-retain-interval
            --non-persistent-save-interval --non-persistent-ckpt-type --non-persistent-global-ckpt-dir
            --non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo --replication --replication-jump
            --replication-factor""",
    ),
    Fate(
        "a run's length is its rollouts",
        "Pass --num-rollout N or --num-epoch N; a signal ends a run after its step.",
        names="""
            --train-iters --train-samples --exit-interval --exit-duration-in-mins --exit-signal
            --exit-signal-handler-for-dataloader --exit-signal-handler-for-training --iterations-to-skip""",
    ),
    Fate(
        "a step has as many samples throughout the run",
        "Pass --global-batch-size N or --num-steps-per-rollout N.",
        names="--rampup-batch-size --step-batch-size-schedule --decrease-batch-size-if-needed --batch-size",
    ),
    Fate(
        "the rate is counted in optimizer steps, by four settings",
        "Pass --lr, --lr-warmup-fraction or --lr-warmup-iters, --lr-decay-style, --min-lr; --weight-decay is constant.",
        groups="learning rate and weight decay",
    ),
    Fate(
        "a resumed run has the schedule of its own flags",
        names="--override-opt-param-scheduler",
    ),
    Fate("updates are AdamW's", "Leave it out; --optimizer is adam.", groups="regularization"),
    Fate(
        "the trainer computes in float32 or bfloat16, and sums gradients in float32",
        "Pass --train-dtype bfloat16.",
        groups="mixed precision, Transformer-Engine",
        names="""
            --fp8-quantizer-factory --fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo
            --no-fp8-wgrad --disable-fp8-wgrad --fp8-output-proj --first-last-layers-bf16
            --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16 --use-kitchen-attention
            --kitchen-attention-backend --fp4-format --fp4-recipe --fp4-quantizer-factory --fp32-residual-connection
            --disable-bf16-reduced-precision-matmul --moe-dispatch-fwd-dtype --moe-combine-bwd-dtype
            --main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype""",
    ),
    Fate(
        "ranks share the model by tensor, pipeline, data and expert parallelism",
        "Leave it out; --use-distributed-optimizer splits the optimizer's states over data parallel ranks.",
        groups="distributed init",
        names="""
            --hierarchical-context-parallel-sizes --hybrid-context-parallel --max-seqlen-per-dp-cp-rank
            --tensor-parallel-num-weight-shards --expert-tensor-parallel-num-weight-shards
            --megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype --megatron-fsdp-grad-comm-dtype
            --megatron-fsdp-enable-fine-grained-param-gather --megatron-fsdp-max-pool-double-buffer
            --fsdp-db-use-persist-buf-on-alloc-fail""",
    ),
    Fate(
        "prompts come from files and tasks, and their texts from the policy",
        "Pass --prompt-data FILE, or --task NAME.",
        groups="data and dataloader, sft, Logits Distillation",
        names="--dataloader-type",
    ),
    Fate(
        "the tokenizer is the checkpoint's own",
        "Leave it out; --no-apply-chat-template and --apply-chat-template-kwargs say how prompts are written.",
        groups="tokenizer",
    ),
    Fate(
        "evaluations are of prompts",
        "Pass --eval-interval N --eval-prompt-data NAME FILE.",
        groups="validation",
    ),
    Fate(
        "samples come from this project's engines, not from Megatron's",
        _LEAVE,
        groups="rl, inference",
        names="""
            --inference-cuda-graph-scope --flash-decode --inference-fuse-tp-communication --nccl-all-reduce-for-prefill
            --inference-disable-triton-nvls-kernels --inference-grouped-gemm-backend
            --inference-moe-disable-fused-quant-kernels --inference-moe-token-dispatcher-type
            --moe-pad-experts-for-cuda-graph-inference --mlp-chunks-for-prefill --inference-rng-tracker""",
    ),
    Fate(
        "the trainer is not profiled by a flag",
        "Leave it out; perf/* has each phase's time, and nsys attaches to the actors.",
        groups="profiling",
    ),
    Fate("the policy is a decoder of text", _LEAVE, groups="vision, biencoder"),
    Fate(
        "engines are replaced by the run itself, and a trainer that fails ends the run",
        "Leave it out; --save-interval with --load makes one command of the first start and every restart.",
        groups="In-process restart, ft_package, rerun engine, fault injector",
    ),
    Fate(
        "no loss or noise balances the experts, and none has a capacity",
        _LEAVE,
        names="""
            --moe-router-quantile-balancing-ema --moe-router-force-load-balancing --moe-router-force-biased
            --moe-z-loss-coeff --moe-input-jitter-eps --moe-per-layer-logging --moe-expert-capacity-factor
            --moe-pad-expert-input-to-capacity --moe-expert-rank-capacity-factor""",
    ),
    Fate(
        "experts are replayed by another flag here",
        "Pass --use-rollout-routing-replay.",
        names="--moe-enable-routing-replay",
    ),
    Fate(
        *_SETTINGS,
        groups="transformer configuration, training, RNG and initialization, experimental",
        names="--moe-use-upcycling --moe-upcycling-granularity",
    ),
)


@cache
def num_values_of_megatron() -> Mapping[str, str]:
    """Return how many values each of Megatron's flags has."""
    return {name: num for flags in _groups().values() for name, num in flags.items()}


@cache
def fates() -> Mapping[str, Fate]:
    """Return the fate of each of Megatron's flags, also of those that have a meaning of their own here."""
    of_groups = {title: fate for fate in FATES for title in fate.titles}
    named = {name: fate for fate in FATES for name in fate.names.split()}
    return {name: named.get(name, of_groups[title]) for title, flags in _groups().items() for name in flags}


@cache
def without_effect_of_megatron() -> Mapping[str, WithoutEffect]:
    """Return those of Megatron's flags that change nothing, each with the reason."""
    num_values = num_values_of_megatron()
    return {name: WithoutEffect(fate.reason, num_values[name]) for name, fate in fates().items() if fate.remedy is None}


@cache
def refused_of_megatron() -> Mapping[str, tuple[str, str]]:
    """Return those of Megatron's flags that are refused, each with the reason and the remedy."""
    return {name: (fate.reason, fate.remedy) for name, fate in fates().items() if fate.remedy is not None}


def _groups() -> Mapping[str, Mapping[str, str]]:
    return read_json_object(TABLE)
