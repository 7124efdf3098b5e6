"""The table of miles's flags beyond slime's, which this project has no part for: each with the reason and a remedy."""

from __future__ import annotations

from collections.abc import Mapping

_ASYNC = (
    "each step generates, trains and pushes in turn: no sample is older than its weights, but for --partial-rollout",
    "Leave it out; --partial-rollout with --over-sampling-batch-size keeps engines busy to a step's end.",
)
_OFFLOAD = (
    "what leaves the GPU waits in host memory, whole",
    "Leave it out; --optimizer-cpu-offload keeps Adam's moments there for good.",
)
_FAULTS = (
    "engines are watched and replaced by the run itself, and a trainer that fails ends the run",
    "Leave it out; --save-interval with --load makes one command of the first start and every restart.",
)
_LORA = (
    "Megatron-Core has no low-rank adapters, and every weight is trained",
    "Leave it out; --optimizer-cpu-offload and --recompute-activations save the trainer's memory.",
)
_KERNELS = ("the trainer's kernels are Megatron-Core's and torch's, chosen by the model", "Leave it out.")
_EVAL = (
    "evaluations run on the run's own engines, between steps",
    "Leave it out; `slime-spec eval CHECKPOINT` evaluates an export elsewhere meanwhile.",
)
_TEACHER = (
    "no teacher is asked for logprobs: there is no on-policy distillation here",
    "Leave it out, or let a teacher judge replies: --custom-rm-path module:function.",
)
_SINKS = (
    "metrics go to metrics.jsonl, the console, wandb and TensorBoard",
    "Leave it out; --use-wandb, --use-tensorboard, or read metrics.jsonl of the run folder.",
)
_DUMPS = (
    "tensors and events of single passes are not written",
    "Leave it out; --save-samples and --save-debug-rollout-data keep what was generated, run.log what happened.",
)
_SESSIONS = (
    "turns are asked of a client in the function's own process, by tokens",
    "Leave it out; generate(args, sample, sampling_params, client) asks for turns (docs/agents.md).",
)
_TESTS = ("is for the tests of its own framework", "Leave it out.")
_PUSHES = (
    "a push carries whole tensors, by --push-transport",
    "Leave it out; --sglang-weight-transport disk hands files to servers.",
)
_CHECKS = (
    "every push is checked: target and draft, each tensor by its checksum",
    "Leave it out; --no-check-weight-update-equal leaves out the reading back.",
)

_GROUPS: Mapping[tuple[str, str], str] = {
    _ASYNC: """
        --fully-async --max-weight-staleness --async-max-concurrent-samples --async-data-buffer-capacity-factor
        --async-unused-samples-handler --custom-async-data-buffer-path --rollout-submission-granularity
        --pause-generation-mode""",
    _OFFLOAD: """
        --offload-rollout-level --offload-train-target --offload-train-disk-dir --offload-train-disk-chunk-mb
        --stream-optimizer-state-to-disk --stream-optimizer-state-moment-dtype --train-memory-margin-bytes
        --rematerialize-param-from-master-weight --check-rematerialize-param-from-master-weight --low-memory-resume""",
    _FAULTS: """
        --ft-components --control-server-port --mini-ft-controller-enable --mini-ft-controller-poll-interval
        --mini-ft-controller-resume-delay --indep-dp --save-trigger-sentinel --custom-megatron-post-save-hook-path""",
    _LORA: """
        --lora-type --target-modules --exclude-modules --lora-adapter-path --lora-sync-from-tensor
        --lora-base-cpu-backup --lora-train-only --experts-shared-outer-loras --multi-lora-n-adapters
        --multi-lora-adapter --multi-lora-idle-poll-s --multi-lora-http-server-path --multi-lora-backend-path
        --multi-lora-api-port --multi-lora-disable-service-mode --multi-lora-max-adapter-global-batch-size
        --multi-lora-max-coalesce-wait-s --multi-lora-max-empty-wait-s --check-lora-weight-equal""",
    _KERNELS: """
        --qkv-format --linear-attention-backend --miles-dsa-topk-backend --dsa-attention-backend
        --true-on-policy-mode --recompute-logprobs-via-prefill --extra-high-precision-layers-hf
        --extra-high-precision-layers-megatron --use-indexer-replay --use-rollout-indexer-replay
        --debug-deterministic-collective""",
    _EVAL: """
        --eval-num-gpus --eval-num-gpus-per-engine --eval-hf-dir --eval-max-in-flight --eval-overflow-policy
        --eval-keep-snapshots""",
    _TEACHER: """
        --opd-log-prob-top-k --opd-top-k-strategy --opd-reward-weight-mode --opd-topk-per-position
        --opd-teacher-urls --opd-teacher-key""",
    _SINKS: """
        --use-mlflow --mlflow-tracking-uri --mlflow-experiment-name --mlflow-run-name --mlflow-run-id
        --use-prometheus --prometheus-port --prometheus-run-name --mfu-peak-tflops --env-report""",
    _DUMPS: """
        --save-debug-trajectory-data --save-debug-event-data --dumper-enable --dumper-dir --dumper-inference
        --dumper-fwd-only --dumper-fwd-bwd --dumper-source-patcher-config-inference
        --dumper-source-patcher-config-train --enable-event-analyzer --enable-witness --witness-buffer-size
        --save-local-weight-checksum --observe-training-entropy""",
    _SESSIONS: """
        --use-session-server --session-server-ip --session-server-port --tito-model --session-message-matcher
        --session-sample-picker-path --session-sample-postprocessor-path --chat-template-path --use-miles-router
        --miles-router-timeout --miles-router-max-connections --miles-router-health-check-failure-threshold""",
    _TESTS: """
        --debug-skip-weight-update --debug-disable-optimizer --debug-exit-after-rollout --ci-ft-test-actions
        --ci-inject-rollout-data-path --ci-inject-rollout-data-start-rollout-id
        --ci-inject-rollout-data-min-match-ratio --ci-disable-logprobs-checker --ci-disable-weight-update-checker
        --ci-metric-checker-key --ci-metric-checker-threshold --ci-save-model-hash --ci-check-model-hash""",
    _PUSHES: """
        --update-weight-transfer-mode --p2p-transfer-num-workers --p2p-transfer-timeout --object-store-backend
        --mooncake-store-init-kwargs --mooncake-replica-num""",
    _CHECKS: """
        --check-weight-update-selector --check-weight-update-skip-list --check-weight-update-allow-quant-error""",
    ("servers that run already are named by their addresses", "Pass --rollout-external-engine-addrs HOST:PORT ..."): """
        --rollout-external""",
    ("the ratio is always against the rollout's own logprobs, without a pass before the step", "Leave it out."): """
        --skip-actor-forward-only""",
    ("a step takes all of its samples, in batches of --global-batch-size", "Leave it out."): """
        --allow-partial-train-step --disable-rollout-trim-samples --use-dynamic-global-batch-size
        --delay-split-train-data-by-dp""",
    ("the driver runs where the command was started", "Start it on the head node (docs/clusters.md)."): """
        --pin-rollout-manager-to-head""",
}

REFUSED_OF_MILES: Mapping[str, tuple[str, str]] = {
    name: told for told, names in _GROUPS.items() for name in names.split()
}
