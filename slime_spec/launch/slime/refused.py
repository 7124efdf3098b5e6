"""The table of slime's flags that are refused, each with the reason and with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_NO_SFT = (
    "this project trains by reinforcement learning alone",
    "Train on given replies with slime or TRL, and pass the checkpoint as --hf-checkpoint.",
)
_NO_TEACHER = (
    "no teacher is asked for logprobs: there is no on-policy distillation here",
    "Leave it out, or let a teacher judge replies: --custom-rm-path module:function.",
)
_TRANSPORTS = (
    "a push carries whole tensors, by --push-transport",
    "Leave it out; --sglang-weight-transport disk hands files to servers.",
)
_WHOLE_POLICY = ("the whole policy is trained", "Leave it out.")
_OF_SERVER = ("is a flag of sglang.launch_server, which a run starts itself", "Pass --sglang-{0} VALUE.")
_OF_RAY = (
    "is a flag of Ray's own commands, and this project starts its own Ray",
    "Leave it out; --ray-address joins a cluster that runs. The command's variables reach the Ray that it starts.",
)
_LOOP = ("the loop around a rollout is not replaced by a function here", "Leave it out.")
_NO_CRITIC = (
    "no critic is trained: advantages come from whole replies' rewards",
    "Leave it out; --advantage-estimator grpo compares replies to one prompt, reinforce_plus_plus needs no group.",
)
_NO_ROUTER = (
    "is an option of a router, which a run does not start",
    "Start sglang_router by itself with it, and pass --sglang-router-addr HOST:PORT.",
)
_NO_BUFFER_SERVER = (
    "no server of trajectories is asked for samples",
    "Ask it in a function of your own: --rollout-function-path module.function (docs/agents.md).",
)
_NO_PROFILER = (
    "the trainer is not profiled by a flag",
    "Leave it out; perf/* has each phase's time, --dry-run the memory, and py-spy or nsys attach to the actors.",
)
_SLIMES_TESTS = ("is for the tests of its own framework", "Leave it out.")
_MASKED_SEQUENCES = (
    "whole sequences are not masked by their distance to the rollout's policy",
    "Leave it out; --use-tis --tis-mode mask leaves out single tokens, and --eps-clip-c bounds what is left.",
)
_ONE_RUN_FOLDER = ("a run keeps its files in its run folder", "Leave it out; --output-dir names the folder.")

# The options of sglang_router, which slime takes as --router-*.
_OF_ROUTER = """
api-key assignment-mode backend balance-abs-threshold balance-rel-threshold bucket-adjust-interval-secs ca-cert-paths
cache-threshold cb-failure-threshold cb-success-threshold cb-timeout-duration-secs cb-window-duration-secs
chat-template client-cert-path client-key-path control-plane-api-keys control-plane-audit-enabled cors-allowed-origins
decode decode-policy decode-selector disable-circuit-breaker disable-health-check disable-retries dp-aware enable-igw
enable-trace eviction-interval-secs health-check-endpoint health-check-interval-secs health-check-timeout-secs
health-failure-threshold health-success-threshold history-backend jwt-audience jwt-issuer jwt-jwks-uri
jwt-role-mapping log-dir log-level max-concurrent-requests max-idle-secs max-payload-size max-tree-size
mcp-config-path mini-lb model-path oracle-connect-descriptor oracle-password oracle-pool-max oracle-pool-min
oracle-pool-timeout-secs oracle-tns-alias oracle-username oracle-wallet-path otlp-traces-endpoint pd-disaggregation
policy postgres-db-url postgres-pool-max prefill prefill-policy prefill-selector prometheus-duration-buckets
prometheus-host prometheus-port queue-size queue-timeout-secs rate-limit-tokens-per-second reasoning-parser
redis-pool-max redis-retention-days redis-url request-id-headers request-timeout-secs retry-backoff-multiplier
retry-initial-backoff-ms retry-jitter-factor retry-max-backoff-ms retry-max-retries selector service-discovery
service-discovery-namespace service-discovery-port shutdown-grace-period-secs tls-cert-path tls-key-path
tokenizer-cache-enable-l0 tokenizer-cache-enable-l1 tokenizer-cache-l0-max-entries tokenizer-cache-l1-max-memory
tokenizer-path tool-call-parser worker-startup-check-interval worker-startup-timeout-secs
"""
# Reason and remedy -> the flags; {0} is the flag without its hyphens.
_GROUPS: Mapping[tuple[str, str], str] = {
    _NO_SFT: "--loss-mask-type --disable-compute-advantages-and-returns",
    _NO_TEACHER: """
        --use-opd --opd-type --opd-kl-coef --opd-teacher-load --opd-teacher-ckpt-step --teacher-port
        --teacher-warmup-port --teacher-warmup-timeout-s --teacher-sample-reduction-chunk-size
        --teacher-label-reduction-chunk-size --megatron-server-max-length --megatron-server-update-timeout-s
        --megatron-server-warmup""",
    _NO_CRITIC: """
        --use-critic --critic-num-nodes --critic-num-gpus-per-node --critic-load --critic-save --critic-lr
        --critic-lr-warmup-iters --critic-train-only""",
    _NO_ROUTER: "--sglang-router-request-timeout-secs --sglang-router-policy",
    _NO_BUFFER_SERVER: """
        --rollout-buffer-url --fetch-trajectory-retry-times --min-batch-collection-ratio --rollout-task-type""",
    _NO_PROFILER: """
        --memory-snapshot-dir --memory-snapshot-num-steps --profile-target --memory-recorder --record-memory-history""",
    _SLIMES_TESTS: """
        --ci-test --ci-disable-kl-checker --ci-train-rollout-logprob-abs-diff-threshold --ci-save-grad-norm
        --ci-load-grad-norm""",
    _MASKED_SEQUENCES: "--use-opsm --opsm-delta",
    _TRANSPORTS: """
        --custom-update-weight-post-write-path --update-weight-delta-checksum --update-weight-delta-encoding
        --update-weight-disk-dir --update-weight-disk-keep-files
        --update-weight-local-checkpoint-dir --release-train""",
    _WHOLE_POLICY: "--only-train-params-name-list --freeze-params-name-list --freeze-indexer",
    _OF_SERVER: "--host --port --mem-fraction-static --chunked-prefill-size",
    _OF_RAY: "--runtime-env-json --node-ip-address --disable-usage-stats",
    _LOOP: """
        --rollout-data-postprocess-path --custom-megatron-init-path --custom-megatron-before-log-prob-hook-path
        --custom-megatron-before-train-step-hook-path --custom-convert-samples-to-train-data-path""",
    _ONE_RUN_FOLDER: "--wandb-dir --dump-details --save-debug-train-data",
    (
        "event files lie in the run folder",
        "Pass --use-tensorboard alone; --tensorboard-dir names another folder.",
    ): "--tb-project-name --tb-experiment-name",
    (
        "a run that resumes goes on in the wandb run that its folder remembers",
        "Leave it out; --output-dir names the folder.",
    ): "--wandb-run-id",
    ("the trainer computes in float32 or bfloat16", "Pass --train-dtype bfloat16."): """
        --fp16 --fp8-format --fp8-recipe --megatron-deepgemm-forward-layers --megatron-deepgemm-forward-modules
        --megatron-deepgemm-moe-forward-layers --megatron-deepgemm-moe-forward-modules""",
    ("the policy is a model of text alone", "Leave it out."): "--multimodal-keys",
    ("servers prefill and decode both", "Leave it out."): "--prefill-num-servers",
    (
        "a run has one seed, of prompts and of sampling",
        "Pass --seed N.",
    ): "--rollout-seed",
    (
        "equal bits on every run are not promised on GPUs",
        "Leave it out: --seed fixes prompts, uniforms and initialisation; --sglang-enable-deterministic-inference is "
        "the servers' part.",
    ): "--deterministic-mode",
    (
        "settings of a file are checked as flags are",
        "Pass --config PATH.yaml with settings as `slime-spec config` prints them.",
    ): "--custom-config-path --megatron-config-path",
    (
        "a model is built from its checkpoint's config.json",
        "Leave it out; `slime-spec doctor` says whether the family is known.",
    ): "--custom-model-provider-path --qwen-gdn-backend",
    (
        "the correction is by the ratio of two logprobs, not by a function",
        "Leave it out; --use-tis is the correction that slime builds in.",
    ): "--custom-tis-function-path --get-mismatch-metrics",
    (
        "the last policy is exported as a Hugging Face folder, hf/ in the run folder",
        "Leave it out; --no-save-final leaves out the export.",
    ): "--save-hf",
    ("a run goes on at the step that its checkpoint has", "Pass --load DIR."): "--start-rollout-id --ref-ckpt-step",
    (
        "advantages are those of --advantage-estimator",
        "Leave it out; --custom-reward-post-process-path module.function returns (raw rewards, advantages) of a step.",
    ): "--custom-advantage-function-path",
    (
        "a reward becomes an advantage by --advantage-estimator",
        "Pass --custom-reward-post-process-path module.function, a function that returns (rewards, rewards).",
    ): "--disable-rewards-normalization",
    (
        "the policy loss is one of the table of docs/algorithms.md, and no function replaces it",
        "Leave it out; --advantage-estimator chooses the loss, --calculate-per-token-loss how tokens count.",
    ): "--custom-loss-function-path --custom-pg-loss-reducer-function-path",
    (
        "the KL's estimate has no importance weight",
        "Leave it out; --kl-loss-type k3 is the estimate of GRPO.",
    ): "--use-unbiased-kl",
    (
        "the reference of a KL stays as it is for the whole run",
        "Leave it out; start the next run with --ref-load of what this one exports.",
    ): "--ref-update-interval",
    (
        "Adam's moments live as long as the run",
        "Leave it out; --optimizer-cpu-offload takes them off the GPU.",
    ): "--reset-optimizer-states --use-stateless-adam",
    (
        "tokens of earlier weights count in the loss, by the probabilities that they had",
        "Leave it out; --tis-clip bounds their weight, and without --partial-rollout there are none.",
    ): "--mask-offpolicy-in-partial-rollout",
    (
        "prompts come from data or tasks by their numbers, so that a run resumes with the same",
        "Pass --task module:object for prompts that code makes (docs/prompts.md), or a rollout function that brings "
        "its own: --rollout-function-path.",
    ): "--disable-rollout-global-dataset",
    (
        "groups that a filter drops are counted (rollout/dynamic_filter/*) and given to no function",
        "Leave it out; --custom-rollout-log-function-path sees the samples that are trained on.",
    ): "--rollout-all-samples-process-path",
    (
        "a reward's dict is read for its number alone",
        "Leave it out; a function of --custom-rollout-log-function-path sees sample.reward as your reward gives it.",
    ): "--log-reward-category",
    (
        "replies are not logged by whether they are right",
        "Leave it out; --save-samples keeps them all, and slime-spec report shows some side by side.",
    ): "--log-correct-samples",
    (
        "an evaluation's longest sequence is its longest prompt and its longest response",
        "Pass --eval-max-prompt-len and --eval-max-response-len.",
    ): "--eval-max-context-len",
    (
        "saved samples are read in this project's form, whole",
        "Pass --load-debug-rollout-data FILES alone, of a run with --save-debug-rollout-data.",
    ): "--load-forge-rollout-data --load-debug-rollout-data-subsample",
    (
        "engines are asked directly",
        "Leave it out; NO_PROXY=* in the environment keeps a proxy of yours away from them.",
    ): "--http-proxy",
    ("is a flag of sglang.launch_server", "Pass --hf-checkpoint DIR."): "--model-path",
    ("is a flag of sglang.launch_server", "Pass --rollout-num-gpus-per-engine N."): "--tp",
    (
        "the trainer has the variables of the environment in which its Ray was started",
        "Set them before the command, or before the Ray that --ray-address joins.",
    ): "--train-env-vars",
}


def _rows() -> Iterator[tuple[str, tuple[str, str]]]:
    for (rule, remedy), names in _GROUPS.items():
        for name in names.split():
            yield name, (rule, remedy.format(name.removeprefix("--")))


REFUSED_OF_SLIME: Mapping[str, tuple[str, str]] = dict(_rows())
REFUSED_OF_ROUTER: Mapping[str, tuple[str, str]] = {f"--router-{each}": _NO_ROUTER for each in _OF_ROUTER.split()}
