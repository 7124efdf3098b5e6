"""Launches that are refused for a setting, or for the file of --config: what a dry run and the doctor say as well."""

from __future__ import annotations

from itertools import pairwise

TRAIN_ONLY = "--debug-train-only --load-debug-rollout-data d_{rollout_id}.pt"
EAGLE3 = "--speculative-algorithm EAGLE3 --speculative-draft-model-path d"
NGRAM = "--speculative-algorithm NGRAM"

# Words of a command line, and the setting to change.
CONTRADICTIONS = (
    ("--sp-min-token-match 5 --sp-max-token-match 4", "speculative.min_token_match"),
    ("--debug-rollout-only --load-debug-rollout-data d.pt", "run.load_debug_rollout_data"),
    ("--load-debug-rollout-data d.pt", "run.load_debug_rollout_data"),
    ("--debug-train-only", "run.mode"),
    (f"{TRAIN_ONLY} --save-debug-rollout-data e_{{rollout_id}}.pt", "run.save_debug_rollout_data"),
    ("--save-debug-rollout-data d.pt", "run.save_debug_rollout_data"),
    ("--prompt-data d.jsonl --task max4", "task.prompt_data"),
    ("--task", "task.names"),
    (
        "--sglang-context-length 100 --rollout-max-prompt-len 80 --rollout-max-response-len 21",
        "engine.context_length",
    ),
    (
        "--sglang-max-total-tokens 100 --rollout-max-prompt-len 80 --rollout-max-response-len 21",
        "engine.max_total_tokens",
    ),
    ("--rollout-top-k 0", "rollout.top_k"),
    ("--rollout-temperature 0", "rollout.temperature"),
    ("--n-samples-per-prompt 1", "rollout.n_samples_per_prompt"),
    ("--rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 6", "trainer.global_batch_size"),
    ("--rollout-batch-size 4 --n-samples-per-prompt 4 --num-steps-per-rollout 3", "trainer.num_steps_per_rollout"),
    (
        "--rollout-batch-size 4 --n-samples-per-prompt 4 --num-steps-per-rollout 2 --global-batch-size 4",
        "trainer.num_steps_per_rollout",
    ),
    ("--kl-coef 0.1 --kl-loss-coef 0.1", "algorithm.kl_coef"),
    ("--use-tis --tis-clip 0.5 --tis-clip-low 0.6", "algorithm.tis_clip_low"),
    ("--lr-warmup-iters 2 --lr-warmup-fraction 0.1", "trainer.lr_warmup_fraction"),
    ("--lr 1e-6 --min-lr 1e-5 --lr-decay-style cosine", "trainer.min_lr"),
    ("--num-rollout 5 --lr-warmup-iters 5 --lr-decay-style linear", "trainer.lr_warmup_steps"),
    ("--actor-world-size 3 --tensor-model-parallel-size 2", "trainer.world_size"),
    ("--actor-num-gpus 2 --no-colocate", "trainer.num_gpus"),
    ("--debug-rollout-only --load checkpoints", "trainer.load"),
    ("--rm-type exact", "task.reward"),
    (f"{EAGLE3} --draft-lr 1e-4", "draft_training.lr"),
    (f"{EAGLE3} --enable-draft-training --draft-max-rows 64 --draft-max-length 64", "draft_training.max_rows"),
    ("--label-key answer", "task.label_key"),
    ("--tool-key tools", "task.tool_key"),
    ("--chat-date yesterday", "task.chat_date"),
    ("--sp-type deterministic --advice-key draft", "task.advice_key"),
    ("--rollout-num-gpus-per-engine 2 --no-colocate", "rollout.num_gpus_per_engine"),
    ("--rollout-num-gpus-per-engine 1", "cluster.colocate"),
    ("--rollout-num-engines 2 --rollout-num-gpus-per-engine 1 --actor-num-gpus 1", "cluster.colocate"),
)
# Words of a command line, the setting of speculation to change, and words of the remedy.
SPECULATIVE_CONTRADICTIONS = (
    ("--speculative-algorithm EAGLE3", "draft_model_path", "--speculative-draft-model-path DIR"),
    ("--speculative-algorithm STANDALONE", "draft_model_path", "--speculative-draft-model-path DIR"),
    (
        "--rollout-engine sglang --speculative-algorithm DFLASH",
        "draft_model_path",
        "--speculative-draft-model-path DIR",
    ),
    ("--sp-type deterministic --sp-checkpoint-path d", "draft_model_path", "EAGLE3"),
    ("--speculative-draft-model-path d", "draft_model_path", "leave the path out"),
    (f"{NGRAM} --sp-quantization INT8", "draft_model_quantization", "draft model"),
    (f"{EAGLE3} --speculative-draft-model-quantization fp8", "draft_model_quantization", "int8"),
    (f"{EAGLE3} --sp-quantization INT8 --rollout-engine sglang", "draft_model_quantization", "fp8"),
    (f"{EAGLE3} --speculative-history --rollout-engine sglang", "history", "--rollout-engine embedded"),
    (f"{EAGLE3} --speculative-eagle-topk 2", "eagle_topk", "--speculative-num-steps"),
    (f"{EAGLE3} --speculative-num-draft-tokens 4", "num_draft_tokens", "--speculative-num-steps"),
    (f"{EAGLE3} --speculative-num-steps 2 --speculative-eagle-topk 3", "num_draft_tokens", "tokens 5"),
    (
        f"{EAGLE3} --speculative-num-steps 2 --speculative-eagle-topk 3 --speculative-num-draft-tokens 14",
        "num_draft_tokens",
        "tokens 5",
    ),
    (
        f"{EAGLE3} --speculative-use-rejection-sampling --speculative-num-steps 3 --speculative-eagle-topk 2 "
        "--speculative-num-draft-tokens 4",
        "eagle_topk",
        "topk 1",
    ),
    (
        f"{EAGLE3} --speculative-use-block-verification --speculative-num-steps 3 --speculative-eagle-topk 2 "
        "--speculative-num-draft-tokens 4",
        "eagle_topk",
        "topk 1",
    ),
    (f"{NGRAM} --speculative-use-rejection-sampling", "use_rejection_sampling", "exact for every drafter"),
    (
        "--sp-type deterministic --speculative-use-block-verification",
        "use_block_verification",
        "exact for every drafter",
    ),
    (
        f"{EAGLE3} --speculative-use-gumbel-coupling --rollout-engine sglang",
        "use_gumbel_coupling",
        "--rollout-engine embedded",
    ),
    (
        f"{EAGLE3} --speculative-use-rejection-sampling --speculative-draft-temperature 0.5 --rollout-engine sglang",
        "draft_temperature",
        "--rollout-engine embedded",
    ),
    (
        f"{EAGLE3} --speculative-use-gumbel-coupling --rollout-num-gpus-per-engine 1 --no-colocate",
        "use_gumbel_coupling",
        "--rollout-num-gpus-per-engine 0",
    ),
    (
        f"{EAGLE3} --speculative-use-gumbel-coupling --speculative-use-rejection-sampling",
        "use_gumbel_coupling",
        "--no-speculative-use-rejection-sampling",
    ),
    (
        "--speculative-use-gumbel-coupling --speculative-use-block-verification",
        "use_gumbel_coupling",
        "--no-speculative-use-block-verification",
    ),
    (
        f"{EAGLE3} --speculative-use-gumbel-coupling --debug-rollout-only --speculative-lossy "
        "--speculative-accept-threshold-acc 0.9",
        "use_gumbel_coupling",
        "or the thresholds",
    ),
    (
        "--sp-type deterministic --speculative-accept-threshold-single 0.5 --debug-rollout-only",
        "accept_threshold_single",
        "--speculative-lossy",
    ),
    (
        "--sp-type deterministic --speculative-accept-threshold-acc 0.9 --speculative-lossy",
        "accept_threshold_acc",
        "--debug-rollout-only",
    ),
    (
        f"{EAGLE3} --debug-rollout-only --speculative-lossy --speculative-accept-threshold-acc 0.9 "
        "--speculative-use-rejection-sampling",
        "accept_threshold_acc",
        "the other flag",
    ),
    (
        f"{NGRAM} --speculative-ngram-min-bfs-breadth 4 --speculative-ngram-max-bfs-breadth 3",
        "ngram_min_bfs_breadth",
        "breadth 1",
    ),
    (f"{NGRAM} --speculative-ngram-capacity 17", "ngram_capacity", "larger"),
    (f"{NGRAM} --speculative-ngram-external-corpus-path c.jsonl", "ngram_external_sam_budget", "budget 5"),
    (
        f"{NGRAM} --speculative-ngram-external-corpus-path c.jsonl --speculative-ngram-external-sam-budget 12",
        "ngram_external_sam_budget",
        "budget 5",
    ),
    (f"{NGRAM} --speculative-ngram-external-sam-budget 3", "ngram_external_sam_budget", "corpus-path"),
)
# The text of a configuration file, and the setting, or the file, that is named.
BROKEN_FILES = (
    ("trainer:\n  lrr: 1", "trainer.lrr"),
    ("sglang:\n  tp_sise: 2", "sglang.tp_sise"),
    ("sglang:\n  tp_size: two", "sglang.tp_size"),
    ("trainer: {lr: [", "mine.yaml"),
    ("- 1", "mine.yaml"),
    ("", "mine.yaml"),
    ("trainer: {lr: 1, lr: 2}", "mine.yaml"),
    ("trainer: {[lr]: 1}", "mine.yaml"),
    ("trainer: {lr: !!float x}", "mine.yaml"),
    ("trainer: {lr: !!int x}", "mine.yaml"),
    ("trainer: {lr: !!timestamp x}", "mine.yaml"),
    ("sglang: {model_loader_extra_config: !!set {a}}", "mine.yaml"),
    ('run: {name: "\\ud800"}', "run.name"),
    ("run: {seed: 010}", "run.seed"),
    ("run: {seed: 1_000}", "run.seed"),
    ("run: {seed: 12:30:45}", "run.seed"),
    ("trainer: {lr: .inf}", "trainer.lr"),
    ("metrics: {console: 0}", "metrics.console"),
    ("run: &r {name: *r}", "mine.yaml"),
    ("a: &a [x,x,x,x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 8}]\n" for a, b in pairwise("abcdefgh")), "mine.yaml"),
    ("[" * 3000, "mine.yaml"),
    ("trainer: \x00", "mine.yaml"),
)
