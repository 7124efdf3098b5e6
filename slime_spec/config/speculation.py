"""These checks refuse speculative settings that cannot work together, and note those without effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from slime_spec.algorithms import ALGORITHMS, AUTO_CHAIN, NGRAM, NGRAM_DRAFT_TOKENS, OF_DRAFT_MODEL, listed, names
from slime_spec.config.speculative import UNQUANTIZED
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.sglang.draft_shape import check_shape, forced_draft_tokens

FORGED_ACCEPTANCE = "SGLANG_SIMULATE_ACC_LEN"
FP8_CAPABILITY = (8, 9)  # from Ada and Hopper on a GPU computes with e4m3


def engine_decides(config: Config) -> bool:
    """Return whether the embedded engine decides, round by round, how much to draft."""
    return config.speculative.is_automatic and not kind_of(config).has_servers


def fronts_history(config: Config) -> bool:
    """Return whether drafts come from replies before a draft model is asked: by default where the engine decides."""
    spec = config.speculative
    asked = engine_decides(config) if spec.history is None else spec.history
    return asked and spec.record.has_weights


def feeds_corpus(config: Config) -> bool:
    """Return whether SGLang's n-gram servers are fed with the replies to the prompts that they generate for."""
    spec = config.speculative
    return bool(spec.history) and spec.record.takes_corpus and kind_of(config).has_servers


def corpus_nodes(spec: SpeculativeConfig) -> int:
    """Return how many nodes of an n-gram server's drafts come out of its corpora: by default half of them."""
    num_drafts = (spec.num_draft_tokens or NGRAM_DRAFT_TOKENS) - 1
    return spec.ngram_external_sam_budget or max(1, num_drafts // 2)


def reads_replies(config: Config) -> bool:
    """Return whether the engines draft from earlier replies to the same prompt."""
    return config.speculative.record.reads_replies or fronts_history(config) or feeds_corpus(config)


def draft_quantization(config: Config) -> str | None:
    """Return what the embedded engine's draft is rounded to, if anything: by default int8 where a CPU's engine decides.

    The draft's bytes are what one step of it costs there: in int8 it takes half the time, and as much is accepted.
    """
    spec = config.speculative
    if spec.draft_model_quantization is not None:
        return None if spec.draft_model_quantization == UNQUANTIZED else spec.draft_model_quantization
    on_cpu = config.rollout.num_gpus_per_engine == 0
    return "int8" if on_cpu and spec.record.has_weights and engine_decides(config) else None


def check_speculation(config: Config) -> None:
    """Raise ConfigError for the first contradiction among the speculative settings."""
    spec = config.speculative
    record = spec.record
    if record.sglang is None and kind_of(config).has_servers:
        instead = listed(names(lambda each: each.sglang is not None and each.sources == record.sources))
        fed = " --speculative-history (an n-gram server that is fed with the same replies)"
        raise ConfigError(
            "speculative.algorithm",
            f"SGLang has no {spec.algorithm}",
            spec.algorithm,
            f"Pass --speculative-algorithm {instead}{fed if record.reads_replies else ''}, or --rollout-engine "
            "embedded.",
        )
    if record.drafter is None and not kind_of(config).has_servers:
        raise ConfigError(
            "speculative.algorithm",
            f"is known but not available on the {config.rollout.engine} engine in this version; available: "
            + ", ".join(names(lambda each: each.drafter is not None)),
            spec.algorithm,
            f"Pass --speculative-algorithm {listed(names(lambda each: each.drafter is not None and each.has_weights))},"
            f" or {listed(names(lambda each: each.sources == ('text',)))}, which need no draft model.",
        )
    _check_history_of_servers(config)
    _check_draft_model(config)
    check_shape(spec)
    _check_sampled_drafts(spec)
    _check_coupling(config)
    _check_draft_temperature(config)
    _check_thresholds(config)
    _check_lookup(config)
    if record.takes_corpus:
        _check_ngram(spec, feeds_corpus(config))


def _check_history_of_servers(config: Config) -> None:
    """Raise ConfigError where SGLang's servers cannot draft from the replies to a prompt."""
    spec, kind = config.speculative, kind_of(config)
    if not (spec.history and kind.has_servers):
        return
    for is_wrong, rule, remedy in (
        (
            not spec.record.takes_corpus,
            f"SGLang's servers draft from a prompt's replies with {NGRAM.name} alone, whose corpus takes them",
            f"Pass --speculative-algorithm {NGRAM.name} or --rollout-engine embedded, or drop --speculative-history.",
        ),
        (
            config.rollout.num_gpus_per_engine > 1,
            "needs engines of one GPU: every rank takes a corpus into use at a time of its own, and ranks that draft "
            "differently verify different tokens",
            "Pass --rollout-num-gpus-per-engine 1, or drop --speculative-history.",
        ),
        (
            config.sglang_server.router or config.sglang_server.router_addr is not None,
            "needs requests that reach their own engine's server, whose corpus has their replies: a router sends them "
            "anywhere",
            "Drop the router, or --speculative-history.",
        ),
    ):
        if is_wrong:
            raise ConfigError("speculative.history", rule, True, remedy)


def settings_read() -> list[str]:
    """Return the settings that some algorithms read; for other algorithms they have no effect, which a note says."""
    read = {name for each in ALGORITHMS.values() for name in each.reads}
    return [field.name for field in fields(SpeculativeConfig) if field.name in read]


def unused_draft_settings(spec: SpeculativeConfig) -> list[str]:
    """Return those of OF_DRAFT_MODEL that are set although the algorithm has no draft model, as by an experiment."""
    if spec.record.has_weights:
        return []
    default = SpeculativeConfig()
    return [name for name in OF_DRAFT_MODEL if getattr(spec, name) != getattr(default, name)]


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse SGLang's switch that simulates acceptance: its samples do not follow the policy's distribution."""
    if environ.get(FORGED_ACCEPTANCE) not in (None, "", "-1", "-1.0"):
        raise ConfigError(
            FORGED_ACCEPTANCE,
            "forges acceptance, so that samples and their logprobs have no target's distribution",
            environ[FORGED_ACCEPTANCE],
            f"Unset {FORGED_ACCEPTANCE}.",
        )


def speculation_notes(config: Config) -> Iterator[str]:
    """Yield notes on speculative settings that are adjusted or have no effect, one sentence each."""
    spec, default = config.speculative, SpeculativeConfig()
    for name in settings_read():
        is_read = name in spec.record.reads or (name == "history" and feeds_corpus(config))
        if not is_read and getattr(spec, name) != getattr(default, name):
            yield f"speculative.{name} has no effect with speculative.algorithm={spec.algorithm}."
    forced = forced_draft_tokens(spec)
    if forced is not None:
        yield (
            f"speculative.num_draft_tokens={spec.num_draft_tokens} became {forced}: a chain (topk 1) of "
            f"{spec.num_steps} steps is verified as num_steps + 1 tokens."
        )
    if spec.record.has_numbers and spec.num_steps is None and spec.draws_chains and kind_of(config).has_servers:
        numbers = "num_steps={}, eagle_topk={}, num_draft_tokens={}".format(*AUTO_CHAIN)
        yield f"Sampled drafts are chains: the automatic shape is {numbers} for every target."
    if spec.use_gumbel_coupling and spec.record.has_numbers and (spec.eagle_topk or 1) > 1:
        yield (
            f"speculative.use_gumbel_coupling draws the target's tokens; a tree (eagle_topk={spec.eagle_topk}) has the "
            "draft's likeliest tokens all the same."
        )
    if spec.draft_temperature is not None and not (spec.draws_chains and spec.record.can_sample):
        yield (
            f"speculative.draft_temperature={spec.draft_temperature:g} has no effect: no draft is sampled. Pass "
            "--speculative-use-gumbel-coupling, or another rule that samples, with a draft model."
        )
    if spec.lossy and spec.accept_threshold_single == spec.accept_threshold_acc == 1.0 and spec.record.speculates:
        yield "speculative.lossy has no effect: both acceptance thresholds are 1, and the output is exact."


def _check_draft_model(config: Config) -> None:
    spec = config.speculative
    path, quantization = spec.draft_model_path, spec.draft_model_quantization
    has_model = spec.record.has_weights
    if path is not None and not has_model:
        raise ConfigError(
            "speculative.draft_model_path",
            f"has no use with speculative.algorithm={spec.algorithm}, which drafts without a model",
            path,
            f"Pass --speculative-algorithm {listed(names(lambda each: each.can_sample))}, or leave the path out.",
        )
    # A draft inside the target's checkpoint is the target's own MTP head, which its config.json names.
    if path is None and has_model and not spec.record.may_be_in_target:
        raise ConfigError(
            "speculative.draft_model_path",
            f"{spec.algorithm} needs the checkpoint folder of a draft model",
            path,
            "Pass --speculative-draft-model-path DIR.",
        )
    if quantization is not None and not has_model:
        raise ConfigError(
            "speculative.draft_model_quantization",
            f"speculative.algorithm={spec.algorithm} has no draft model to quantise",
            quantization,
            "Leave it out, or choose an algorithm with a draft model.",
        )
    check_quantization(config)


def check_quantization(config: Config) -> None:
    """Raise ConfigError for int8 on servers, which lack it, and fp8 without a GPU; ``check_fp8`` judges GPUs."""
    quantization = config.speculative.draft_model_quantization
    if quantization == "int8" and kind_of(config).has_servers:
        raise ConfigError(
            "speculative.draft_model_quantization",
            "int8 is the embedded engine's, and SGLang's servers end at once on it",
            quantization,
            "Pass --speculative-draft-model-quantization fp8, or --rollout-engine embedded.",
        )
    if quantization == "fp8" and config.rollout.num_gpus_per_engine == 0:
        raise ConfigError(
            "speculative.draft_model_quantization",
            "fp8 needs a GPU that has it, and the engines run on the CPU",
            quantization,
            "Pass --speculative-draft-model-quantization int8, or --rollout-num-gpus-per-engine 1.",
        )


def check_fp8(capability: tuple[int, int]) -> None:
    """Raise ConfigError for a draft in fp8 on the embedded engine's GPU of this compute capability."""
    if capability < FP8_CAPABILITY:
        raise ConfigError(
            "speculative.draft_model_quantization",
            "fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper)",
            "fp8 on a GPU of {}.{}".format(*capability),
            "Leave out --speculative-draft-model-quantization: the draft then computes in the engine's dtype.",
        )


def _check_sampled_drafts(spec: SpeculativeConfig) -> None:
    for name, flag in (
        ("use_rejection_sampling", "--speculative-use-rejection-sampling"),
        ("use_block_verification", "--speculative-use-block-verification"),
    ):
        if not getattr(spec, name) or not spec.record.speculates:
            continue
        if not spec.record.can_sample:
            raise ConfigError(
                f"speculative.{name}",
                f"samples drafts from a draft model's distribution, and {spec.algorithm} has none",
                True,
                f"Drop {flag}: the default verification is exact for every drafter.",
            )
        if (spec.eagle_topk or 1) > 1:
            raise ConfigError(
                "speculative.eagle_topk",
                f"must be 1 with speculative.{name}: a sampled draft is a chain",
                spec.eagle_topk,
                f"Pass --speculative-eagle-topk 1, or drop {flag}.",
            )


def _check_coupling(config: Config) -> None:
    spec, setting, flag = config.speculative, "speculative.use_gumbel_coupling", "--speculative-use-gumbel-coupling"
    if not spec.use_gumbel_coupling:
        return
    if kind_of(config).has_servers:
        raise ConfigError(
            setting,
            f"needs the embedded engine: {config.rollout.engine} draws its tokens in its own way",
            True,
            f"Drop {flag}, or pass --rollout-engine embedded.",
        )
    if config.rollout.num_gpus_per_engine > 0:
        raise ConfigError(
            setting,
            "runs on the CPU, and the engines run on GPUs",
            True,
            f"Drop {flag}, or pass --rollout-num-gpus-per-engine 0.",
        )
    for name in ("use_rejection_sampling", "use_block_verification"):
        if getattr(spec, name):
            raise ConfigError(
                setting,
                f"judges drafts by the target-only walk, and speculative.{name} is another rule",
                True,
                f"Drop {flag}, or pass --no-speculative-{name.replace('_', '-')}.",
            )
    if min(spec.accept_threshold_single, spec.accept_threshold_acc) < 1.0:
        raise ConfigError(
            setting,
            "is exact and has no threshold; speculative.accept_threshold_single and _acc must be 1",
            True,
            f"Drop {flag}, or the thresholds.",
        )


def _check_draft_temperature(config: Config) -> None:
    temperature = config.speculative.draft_temperature
    if temperature is not None and kind_of(config).has_servers:
        raise ConfigError(
            "speculative.draft_temperature",
            f"is the embedded engine's: {config.rollout.engine} samples drafts at the request's own temperature",
            temperature,
            "Drop --speculative-draft-temperature, or pass --rollout-engine embedded.",
        )


def _check_thresholds(config: Config) -> None:
    spec = config.speculative
    for name in ("accept_threshold_single", "accept_threshold_acc"):
        value, flag = getattr(spec, name), f"--speculative-{name.replace('_', '-')}"
        if value == 1.0 or not spec.record.speculates:
            continue
        if config.run.mode == "train":
            raise ConfigError(
                f"speculative.{name}",
                "must be 1 in a training run: below 1 samples no longer have the policy's distribution",
                value,
                f"Drop {flag}, or generate only: --debug-rollout-only with --speculative-lossy.",
            )
        if spec.samples_drafts:
            raise ConfigError(
                f"speculative.{name}",
                "must be 1 with rejection sampling and block verification, which have no threshold",
                value,
                f"Drop {flag}, or the other flag.",
            )
        if not spec.lossy:
            raise ConfigError(
                f"speculative.{name}",
                "below 1 bends the output's distribution, which needs speculative.lossy",
                value,
                f"Drop {flag}, or accept it with --speculative-lossy: every sample is then marked.",
            )


def _check_lookup(config: Config) -> None:
    spec = config.speculative
    if spec.min_token_match > spec.max_token_match:
        raise ConfigError(
            "speculative.min_token_match",
            f"must not exceed speculative.max_token_match={spec.max_token_match}",
            spec.min_token_match,
            "Pass --sp-min-token-match and --sp-max-token-match with the smaller one first.",
        )
    takers = listed(names(lambda each: each.takes_advice))
    if config.task.advice_key is not None and not spec.record.takes_advice and config.run.mode != "train_only":
        raise ConfigError(
            "task.advice_key",
            f"advice is looked up by {takers} alone, and speculative.algorithm is {spec.algorithm}",
            config.task.advice_key,
            f"Pass --speculative-algorithm {takers}, or drop --advice-key.",
        )


def _check_ngram(spec: SpeculativeConfig, is_fed: bool) -> None:
    if spec.ngram_min_bfs_breadth > spec.ngram_max_bfs_breadth:
        raise ConfigError(
            "speculative.ngram_min_bfs_breadth",
            f"must not exceed speculative.ngram_max_bfs_breadth={spec.ngram_max_bfs_breadth}",
            spec.ngram_min_bfs_breadth,
            "Pass --speculative-ngram-min-bfs-breadth 1, or a larger --speculative-ngram-max-bfs-breadth.",
        )
    if spec.ngram_capacity < spec.ngram_max_trie_depth:
        raise ConfigError(
            "speculative.ngram_capacity",
            f"must hold one n-gram of speculative.ngram_max_trie_depth={spec.ngram_max_trie_depth} tokens",
            spec.ngram_capacity,
            "Pass a larger --speculative-ngram-capacity.",
        )
    path = spec.ngram_external_corpus_path
    budget = corpus_nodes(spec) if is_fed else spec.ngram_external_sam_budget
    num_drafts = (spec.num_draft_tokens or NGRAM_DRAFT_TOKENS) - 1
    if (path is not None or is_fed) and not 0 < budget <= num_drafts:
        raise ConfigError(
            "speculative.ngram_external_sam_budget",
            f"must be from 1 to num_draft_tokens - 1 = {num_drafts} with an external corpus",
            budget,
            f"Pass --speculative-ngram-external-sam-budget {max(1, num_drafts // 2)}.",
        )
    if path is None and budget and not is_fed:
        raise ConfigError(
            "speculative.ngram_external_sam_budget",
            "is the share of an external corpus, and there is none",
            budget,
            "Pass --speculative-ngram-external-corpus-path FILE.jsonl, or drop the budget.",
        )
