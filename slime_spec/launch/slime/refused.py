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
_ONE_RUN_FOLDER = ("a run keeps its files in its run folder", "Leave it out; --output-dir names the folder.")

# Reason and remedy -> the flags; {0} is the flag without its hyphens.
_GROUPS: Mapping[tuple[str, str], str] = {
    _NO_SFT: "--loss-mask-type --disable-compute-advantages-and-returns",
    _NO_TEACHER: "--use-opd --opd-type --opd-kl-coef --opd-teacher-load --opd-teacher-ckpt-step",
    _TRANSPORTS: """
        --custom-update-weight-post-write-path --update-weight-delta-checksum --update-weight-delta-encoding
        --update-weight-disk-dir --update-weight-disk-keep-files
        --update-weight-local-checkpoint-dir --release-train""",
    _WHOLE_POLICY: "--only-train-params-name-list --freeze-params-name-list",
    _OF_SERVER: "--host --port --mem-fraction-static --chunked-prefill-size",
    _OF_RAY: "--runtime-env-json --node-ip-address --disable-usage-stats",
    _LOOP: """
        --rollout-data-postprocess-path --custom-megatron-init-path --custom-megatron-before-log-prob-hook-path
        --custom-megatron-before-train-step-hook-path --custom-convert-samples-to-train-data-path""",
    _ONE_RUN_FOLDER: "--wandb-dir --dump-details --save-debug-train-data",
    ("the trainer computes in float32 or bfloat16", "Pass --train-dtype bfloat16."): "--fp16 --fp8-format --fp8-recipe",
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
