"""Random requests against a slow sampler that shares no code with the engine: every token, logprob, ending, version.

All sampling parameters are mixed, in batches, over every drafter and verification rule, with pauses, pushes, aborted
samples that go on, preemptions and shared prompts. A failure names its case and seed: ``batch(case, seed)`` repeats it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from time import perf_counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.model import Decoder
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.verification.reference import exponential_reference
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.partial_samples import request_for_rest
from slime_spec.preflight.requests import check_request
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.support.fp64_sampler import LOGIT_ERROR, Position, logits_after, position
from tests.support.pushes import disturbed
from tests.support.tiny_drafts import DFLASH, DSPARK, EAGLE, EAGLE3, make_tiny_draft, make_tiny_mimo
from tests.support.tiny_models import load_reference, make_tiny_checkpoint

VOCAB, EOS, NUM_LAYERS = 131, 7, 4
# A text for every token, so that stop strings begin and end inside of tokens
TEXTS = [*"abcdefghijkl", *(a + b for a in "abcdefghijkl" for b in "abcdefghijkl")][:VOCAB]
CHAIN = {"num_steps": 3, "eagle_topk": 1}
TREE = {"num_steps": 3, "eagle_topk": 3, "num_draft_tokens": 8}
# case -> (algorithm, its draft's folder, settings)
CASES = {
    "plain": ("NONE", None, {}),
    "lookup": ("LOOKUP", None, {"num_draft_tokens": 5, "min_token_match": 1}),
    "history": ("HISTORY", None, {"num_draft_tokens": 6}),
    "ngram": ("NGRAM", None, {"num_draft_tokens": 6}),
    "standalone chain": ("STANDALONE", "near", CHAIN),
    "standalone tree": ("STANDALONE", "near", TREE),
    "standalone by rejection": ("STANDALONE", "near", {**CHAIN, "use_rejection_sampling": True}),
    "standalone by blocks": ("STANDALONE", "near", {**CHAIN, "use_block_verification": True}),
    "standalone by races": ("STANDALONE", "near", {**CHAIN, "use_gumbel_coupling": True}),
    "standalone by thresholds": ("STANDALONE", "near", {**TREE, "lossy": True, "accept_threshold_acc": 0.5}),
    "eagle3 tree": ("EAGLE3", "eagle3", TREE),
    "eagle3 by rejection": ("EAGLE3", "eagle3", {**CHAIN, "use_rejection_sampling": True}),
    "eagle3 by races": ("EAGLE3", "eagle3", {**CHAIN, "use_gumbel_coupling": True}),
    "dflash": ("DFLASH", "dflash", {"num_draft_tokens": 5}),
    "dflash by rejection": ("DFLASH", "dflash", {"num_draft_tokens": 5, "use_rejection_sampling": True}),
    "dflash by blocks": ("DFLASH", "dflash", {"num_draft_tokens": 6, "use_block_verification": True}),
    "dflash by races": ("DFLASH", "dflash", {"num_draft_tokens": 6, "use_gumbel_coupling": True}),
    "dflash by rejection behind texts": (
        "DFLASH",
        "dflash",
        {"num_draft_tokens": 6, "use_rejection_sampling": True, "history": True},
    ),
    "dspark by rejection": ("DSPARK", "dspark", {"num_draft_tokens": 6, "use_rejection_sampling": True}),
    "dspark by blocks": ("DSPARK", "dspark", {"num_draft_tokens": 6, "use_block_verification": True}),
    "dspark by races": ("DSPARK", "dspark", {"num_draft_tokens": 6, "use_gumbel_coupling": True}),
    "eagle chain": ("EAGLE", "eagle", CHAIN),
    "mtp tree": ("NEXTN", None, TREE),
    "standalone chain behind texts": ("STANDALONE", "near", {**CHAIN, "history": True}),
    "eagle3 by rejection behind texts": (
        "EAGLE3",
        "eagle3",
        {**CHAIN, "use_rejection_sampling": True, "history": True},
    ),
    "mtp tree behind texts": ("NEXTN", None, {**TREE, "history": True}),
}
SCENARIOS = ("straight", "pause", "retract", "push", "resume", "resume after a push")


@dataclass
class Tally:
    """What was compared; ``ranks`` are the uniforms that would have drawn the tokens from likeliest to least likely."""

    num_samples: int = 0
    num_tokens: int = 0
    num_near_ties: int = 0
    num_accepted: int = 0
    num_of_two_versions: int = 0
    num_preempted: int = 0
    ranks: list[float] = field(default_factory=list)


@dataclass
class Case:
    name: str
    config: Config
    core: GenerationCore
    assembly: Assembly
    decoders: tuple[Decoder, Decoder]  # of the weights before and after a push
    models: tuple[torch.nn.Module, ...]  # the same in transformers, in fp64
    pushed: dict[int, int] = field(default_factory=lambda: {0: 0})  # version -> which weights

    @property
    def exact(self) -> bool:
        return self.config.speculative.accept_threshold_acc == 1.0

    @property
    def samples_drafts(self) -> bool:
        return self.config.speculative.use_rejection_sampling or self.config.speculative.use_block_verification

    def use(self, which: int) -> None:
        """Serve the weights before (0) or after (1) a push, as a version of its own."""
        version = self.core.version + 1
        self.pushed[version] = which
        self.core.use(self.decoders[which], version)


def add_tokenizer(folder: Path) -> Path:
    words = Tokenizer(WordLevel({text: index for index, text in enumerate(TEXTS)}, unk_token="a"))
    words.decoder = decoders.Fuse()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def changed_copy(folder: Path, target: Path, **shape: object) -> Path:
    """A whole model near the target, so that much of what it drafts stands."""
    make_tiny_checkpoint(folder, num_hidden_layers=NUM_LAYERS, eos_token_id=EOS, **shape)
    weights = load_file(target / "model.safetensors")
    near = {name: tensor + 0.1 * (disturbed({name: tensor}, 1)[name] - tensor) for name, tensor in weights.items()}
    save_file(near, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def _rooms_are_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short replies never outgrow the usual slack, so nothing would be preempted."""
    monkeypatch.setattr("rollout.embedded.batch.ADMISSION_SLACK_TOKENS", 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, shape = tmp_path_factory.mktemp("differential"), {"num_hidden_layers": NUM_LAYERS, "eos_token_id": EOS}
    target = add_tokenizer(make_tiny_checkpoint(folder / "target", **shape))
    return {
        "target": target,
        "mimo": add_tokenizer(make_tiny_mimo(folder / "mimo", **shape)),
        "twin": make_tiny_checkpoint(folder / "twin", "Qwen2ForCausalLM", **shape),
        "near": changed_copy(folder / "near", target),
        "eagle3": make_tiny_draft(folder / "eagle3", target, EAGLE3),
        "eagle": make_tiny_draft(folder / "eagle", target, EAGLE),
        "dflash": make_tiny_draft(folder / "dflash", target, DFLASH),
        "dspark": make_tiny_draft(folder / "dspark", target, DSPARK),
    }


def make_case(name: str, folders: dict[str, Path]) -> Case:
    algorithm, draft, settings = CASES[name]
    is_mtp = algorithm == "NEXTN"
    target = folders["mimo" if is_mtp else "target"]
    draft_path = None if draft is None else str(folders[draft])
    config = Config(
        model=ModelConfig(hf_checkpoint=str(target)),
        speculative=SpeculativeConfig(algorithm=algorithm, draft_model_path=draft_path, **settings),  # type: ignore[arg-type]
        engine=EngineConfig(max_total_tokens=140, max_running_requests=6),  # so that some wait, and some are preempted
    )
    assembly = Assembly(config)
    assembly.load_tokenizer()
    core = assembly.core(0, perf_counter)
    stored = load_file(target / "model.safetensors")
    old = {key: stored[key] for key in expected_shapes(assembly.spec)}
    builder = assembly.builder(assembly.device)
    for key, tensor in (new := disturbed(old, 3)).items():
        builder.add(key, tensor)
    models = [load_reference(folders["twin"] if is_mtp else target, torch.float64) for _ in range(2)]
    for model, weights in zip(models, (old, new), strict=True):
        model.load_state_dict({key: tensor.double() for key, tensor in weights.items()}, strict=False)
    return Case(name, config, core, assembly, (core.decoder, builder.finish()), tuple(models))


def random_params(rng: random.Random, algorithm: str) -> SamplingParams:
    """Mostly one or two parameters at a time, sometimes all of them."""
    rate = rng.choice([0.1, 0.3, 1.0])

    def some(default: object, *others: object) -> object:
        return rng.choice(others) if rng.random() < rate else default

    max_new = rng.randint(1, 24)
    token_ids = [rng.randrange(VOCAB) for _ in range(6)]
    biases = tuple(zip(dict.fromkeys(token_ids), rng.choices([-inf, -5.0, 0.5, 3.0, 30.0], k=6), strict=False))
    stops = tuple(rng.choice([TEXTS[a], TEXTS[a] + TEXTS[b], TEXTS[a][-1] + TEXTS[b][0]]) for a, b in [token_ids[:2]])
    values = {
        "max_new_tokens": max_new,
        "temperature": some(1.0, 0.0, 0.2, 0.7, 1.4, 5.0),
        "top_k": some(-1, 1, 3, 20, 500),
        "top_p": some(1.0, 1e-9, 0.5, 0.9, 0.999),
        "min_p": some(0.0, 0.01, 0.2, 1.0),
        "frequency_penalty": some(0.0, -1.5, 0.4, 2.0),
        "presence_penalty": some(0.0, -1.5, 0.4, 2.0),
        "repetition_penalty": some(1.0, 0.6, 1.3, 2.0),
        "logit_bias": some((), biases),
        "min_new_tokens": some(0, rng.randint(1, max_new)),
        "stop": some((), stops, (*stops, "never there"), ("".join(rng.choices("abcdefghijkl", k=2)),)),
        "stop_token_ids": some((), tuple(token_ids[2:]), (EOS, 5000)),
        "ignore_eos": some(False, True),
        "speculative": rng.random() < 0.9,
    }
    if algorithm == "LOOKUP":
        values |= {"advice_token_ids": some((), tuple(token_ids)), "edit": False}
    return SamplingParams(**values)  # type: ignore[arg-type]


def random_requests(rng: random.Random, case: Case) -> list[GroupRequest]:
    requests = []
    for index in range(rng.randint(1, 4)):
        params = random_params(rng, case.config.speculative.algorithm)
        words = [rng.randrange(VOCAB) for _ in range(rng.choice([2, 5, VOCAB]))]
        prompt = tuple(rng.choice(words) for _ in range(rng.randint(1, 40)))
        seeds = tuple(rng.getrandbits(63) for _ in range(rng.randint(1, 4)))
        requests.append(GroupRequest(f"g{index}", prompt, seeds, params))
        check_request(requests[-1], case.assembly.limits)
    return requests


def batch(case: Case, seed: int) -> list[tuple[GroupRequest, GeneratedSample]]:
    """Samples of one batch of random requests, with what the scenario does to them midway."""
    rng = random.Random(f"{case.name} {seed}")
    requests, scenario, core = random_requests(rng, case), rng.choice(SCENARIOS), case.core
    done: list[GeneratedSample] = []
    for request in requests:
        core.add(request, done.append)
    for _ in range(rng.randint(0, 6)):
        if core.has_work:
            core.step()
    if scenario in ("pause", "retract", "push"):
        core.pause("in_place" if scenario == "pause" else "retract")
    elif scenario != "straight":
        core.pause("abort")
    if scenario in ("push", "resume after a push"):
        case.use(1 - case.pushed[core.version])
    core.resume()
    for request in requests:
        if partials := [each for each in done if each.group_id == request.group_id and each.finish_reason == "abort"]:
            done = [each for each in done if each not in partials]
            core.add(request_for_rest(request, partials), done.append)
    while core.has_work:
        core.step()
    return [(request, sample) for request in requests for sample in done if sample.group_id == request.group_id]


def check(case: Case, request: GroupRequest, sample: GeneratedSample, tally: Tally) -> None:
    """Hold one sample against the slow sampler, token by token."""
    params, prompt, reply = request.params, request.prompt_token_ids, list(sample.token_ids)
    versions = [next(version for first, version in sample.spans[::-1] if first <= t) for t in range(len(reply))]
    logits = {which: logits_after(case.models[which], prompt, reply) for which in {case.pushed[v] for v in versions}}
    uniforms = Uniforms(request.seeds[sample.sample_index], params.max_new_tokens)
    stops = [token_id for token_id in params.stop_token_ids if token_id < VOCAB]
    for t, token_id in enumerate(reply):
        row = logits[case.pushed[versions[t]]][t]
        known = position(row, replace(params, stop_token_ids=tuple(stops)), prompt, reply[:t], (EOS,))
        assert sample.logprobs[t] == pytest.approx(float(known.logprobs[token_id]), abs=logprob_error(params)), t
        if case.config.speculative.use_gumbel_coupling and params.temperature > 0.0:
            check_raced_token(known, token_id, uniforms.noise.key(t), tally)
        else:
            check_token(case, params, known, token_id, uniforms.emit[t], tally)
        assert ending(params, reply[: t + 1]) == (None if t + 1 < len(reply) else found_ending(sample)), t
    assert sample.weight_version == min(versions)
    check_counters(case, params, sample)
    tally.num_samples += 1
    tally.num_tokens += len(reply)
    tally.num_accepted += sample.spec.num_correct
    tally.num_of_two_versions += len(set(versions)) > 1
    tally.num_preempted += sample.num_preemptions > 0


def logprob_error(params: SamplingParams) -> float:
    return 2 * LOGIT_ERROR / (1.0 if params.temperature == 0.0 else min(params.temperature, 1.0))


def check_token(
    case: Case, params: SamplingParams, known: Position, token_id: int, uniform: float, tally: Tally
) -> None:
    is_drawn = params.speculative and params.temperature > 0.0
    if is_drawn and (case.samples_drafts or not case.exact):  # other uniforms decide where a draft stands
        assert known.loosest[token_id] > 0, "a filter drops the token"
        p = known.distribution / known.distribution.sum()
        if case.exact:
            likelier = p[p > p[token_id]].sum()
            tally.ranks.append(float(likelier + random.Random(uniform).random() * p[p == p[token_id]].sum()))
        return
    if token_id != known.draw(uniform):
        assert known.may_draw(token_id, uniform), f"the uniform {uniform} draws {known.draw(uniform)}, not {token_id}"
        tally.num_near_ties += 1


def check_raced_token(known: Position, token_id: int, key: int, tally: Tally) -> None:
    exponentials = torch.tensor([exponential_reference(key, each) for each in range(VOCAB)], dtype=torch.float64)
    first = known.race(exponentials)
    if token_id != first:
        assert known.may_win(token_id, exponentials), f"{first} wins, not {token_id}"
        tally.num_near_ties += 1


def ending(params: SamplingParams, reply: list[int]) -> tuple[str, object] | None:
    """Why the reply ends with its last token, by the rules as users read them; None where it does not."""
    if reply[-1] in params.stop_token_ids or (reply[-1] == EOS and not params.ignore_eos):
        return "stop", reply[-1]
    text = "".join(TEXTS[token_id] for token_id in reply)
    if found := [stop for stop in params.stop if stop in text]:
        return "stop", found[0]
    return ("length", None) if len(reply) == params.max_new_tokens else None


def found_ending(sample: GeneratedSample) -> tuple[str, object]:
    return sample.finish_reason, sample.matched_stop


def check_counters(case: Case, params: SamplingParams, sample: GeneratedSample) -> None:
    spec, speculative = sample.spec, case.config.speculative
    assert sample.num_prompt_tokens > 0
    assert spec.num_nonfinite_rounds == 0
    assert sum(spec.histogram) == spec.num_rounds
    if speculative.algorithm == "NONE" or not params.speculative:
        assert (spec.num_rounds, spec.num_drafted, spec.num_correct) == (0, 0, 0)
        return
    # The first token is the prefill's; a stop may cut the last round.
    cut = 1 + spec.num_rounds + spec.num_correct - len(sample.token_ids)
    assert 0 <= cut <= (len(spec.histogram) - 1 if sample.finish_reason == "stop" and spec.histogram else 0)
    assert spec.num_correct <= spec.num_drafted <= spec.num_proposed
    assert spec.num_rounds - spec.num_empty_rounds <= spec.num_drafted


def compare(case: Case, seeds: range) -> Iterator[Tally]:
    """The tally after each batch."""
    tally = Tally()
    for seed in seeds:
        for request, sample in batch(case, seed):
            try:
                check(case, request, sample, tally)
            except AssertionError as error:
                raise AssertionError(f"case {case.name!r} seed {seed}: {error}\n{request}\n{sample}") from error
        assert not case.core.batch.sequences, "a finished batch leaves nothing behind"
        yield tally


@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_of_the_slow_sampler(name: str, folders: dict[str, Path]) -> None:
    *_, tally = compare(make_case(name, folders), range(3))
    assert tally.num_samples >= 3
    assert tally.num_near_ties <= 2


NUM_SAMPLES = 1300


@pytest.mark.long
@pytest.mark.proves("rollout.embedded.drafters")
def test_a_thousand_samples_are_those_of_the_slow_sampler(folders: dict[str, Path]) -> None:
    """Of each case its share, however many batches that takes; two minutes on one core."""
    whole = Tally()
    for name in CASES:
        for tally in compare(make_case(name, folders), range(1000, 10_000)):
            if tally.num_samples >= NUM_SAMPLES / len(CASES):
                break
        whole.num_samples += tally.num_samples
        whole.num_tokens += tally.num_tokens
        whole.num_near_ties += tally.num_near_ties
        whole.num_of_two_versions += tally.num_of_two_versions
        whole.num_preempted += tally.num_preempted
        whole.ranks += tally.ranks
        assert (tally.num_accepted > 0) == (name != "plain"), name
    assert whole.num_samples >= 1000
    assert whole.num_of_two_versions >= 80
    assert whole.num_preempted >= 20
    assert whole.num_near_ties <= whole.num_tokens / 500
    # Kolmogorov and Smirnov: exact samples fail with a probability of 2 exp(-2 · 2.6²) = 3e-6.
    assert distance_from_uniform(whole.ranks) < 2.6


def distance_from_uniform(ranks: list[float]) -> float:
    """The largest difference of the cumulative distributions, times the root of their number."""
    found = torch.tensor(sorted(ranks), dtype=torch.float64)
    steps = torch.arange(len(ranks) + 1, dtype=torch.float64) / len(ranks)
    largest = max((found - steps[:-1]).abs().max(), (found - steps[1:]).abs().max())
    return float(largest) * len(ranks) ** 0.5
