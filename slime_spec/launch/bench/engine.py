"""The embedded engine against Hugging Face ``generate``: speed without speculation, logits, greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from rollout.embedded.assemble import Assembly
from rollout.embedded.attention import RowSpan, make_plan
from rollout.embedded.core import GenerationCore
from rollout.embedded.engine import EmbeddedEngine
from slime_spec.launch.bench.local_engine import engine_config, greedy, started_engine
from slime_spec.launch.bench.prompts import Prompts, tokenized
from slime_spec.launch.bench.rows import BenchOptions, Row, at_least, at_most
from slime_spec.launch.bench.timing import Timed, interleaved, median_ratio, median_s

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
NUM_LOGIT_PROMPTS = 3
Replies = list[tuple[int, ...]]
Times = dict[str, list[Timed[Replies]]]


@dataclass(frozen=True)
class EngineSizes:
    """How much is measured."""

    num_new_tokens: int = 64
    num_rounds: int = 5
    batch_sizes: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def measure(options: BenchOptions) -> list[Row]:
    sizes = EngineSizes(options.num_new_tokens, options.num_rounds)
    return measure_engine(options.model, tokenized(options.model, "ordinary"), sizes)


def measure_engine(model: Path, prompts: Prompts, sizes: EngineSizes) -> list[Row]:
    """Rows per dtype and batch size, then those of fp32's agreement with Hugging Face."""
    rows: list[Row] = []
    agreement: list[Row] = []
    for dtype in sizes.dtypes:
        reference = HfGenerate(model, dtype, sizes.num_new_tokens)
        same: list[bool] = []
        with started_engine(engine_config(model, dtype)) as engine:
            for batch_size in sizes.batch_sizes:
                times = _times(engine, reference, _batches(prompts, batch_size), sizes, f"{dtype}, batch {batch_size}")
                rows += _speed_rows(dtype, batch_size, sizes, times)
                for ours, theirs in zip(times["engine"], times["hf"], strict=True):
                    same += [a == b for a, b in zip(ours.result, theirs.result, strict=True)]
        if dtype == "float32":
            agreement = _agreement_rows(model, reference, prompts, same)
    return rows + agreement


def _times(
    engine: EmbeddedEngine, reference: HfGenerate, batch: Callable[[int], Prompts], sizes: EngineSizes, what: str
) -> Times:
    def ours(turn: int) -> Replies:
        samples = greedy(engine, batch(turn), sizes.num_new_tokens, speculative=False)
        return [sample.token_ids for sample in samples]

    def theirs(turn: int) -> Replies:
        return reference.replies(batch(turn))

    return interleaved(f"engine and Hugging Face, {what}", sizes.num_rounds, {"engine": ours, "hf": theirs})


def _batches(prompts: Prompts, batch_size: int) -> Callable[[int], Prompts]:
    """The prompts of a round: every round begins one prompt further on, so that small batches see several."""

    def of_round(turn: int) -> Prompts:
        return tuple(prompts[(turn + i) % len(prompts)] for i in range(batch_size))

    return of_round


def _speed_rows(dtype: str, batch_size: int, sizes: EngineSizes, times: Times) -> list[Row]:
    prefix = f"engine.{SHORT[dtype]}.b{batch_size}"
    where = f"{SHORT[dtype]}, batch {batch_size}, {sizes.num_new_tokens} greedy tokens a prompt, prefill included"
    num_tokens = batch_size * sizes.num_new_tokens
    ours, theirs = times["engine"], times["hf"]
    our_speed, their_speed = num_tokens / median_s(ours), num_tokens / median_s(theirs)
    rounds = f"median of {sizes.num_rounds} interleaved rounds"
    return [
        Row(f"{prefix}.tokens_per_s", f"embedded engine without speculation, {where}", our_speed, "tokens/s"),
        Row(f"{prefix}.hf_tokens_per_s", f"Hugging Face generate, {where}", their_speed, "tokens/s"),
        at_least(f"{prefix}.ratio", f"engine over Hugging Face, {rounds}", median_ratio(theirs, ours), "x", 1.5),
    ]


def _agreement_rows(model: Path, reference: HfGenerate, prompts: Prompts, same: Sequence[bool]) -> list[Row]:
    core = Assembly(engine_config(model, "float32")).core(0, perf_counter)
    chosen = prompts[:NUM_LOGIT_PROMPTS]
    furthest = 0.0
    for prompt, reply in zip(chosen, reference.replies(chosen), strict=True):
        expected = reference.logits(prompt + reply)
        furthest = max(furthest, float((engine_logits(core, prompt, reply) - expected).abs().max()))
    num_positions = sum(len(prompt) for prompt in chosen) + len(chosen) * reference.num_new_tokens
    return [
        at_most(
            "engine.fp32.logit_diff_max",
            f"largest |logit - Hugging Face's| over {num_positions} positions and the whole vocabulary, the prompts "
            "in one pass and the replies token by token",
            furthest,
            "logits",
            2e-4,
        ),
        at_least(
            "engine.fp32.greedy_identical",
            f"replies identical to Hugging Face's, token for token, of {len(same)} timed",
            sum(same) / len(same),
            "share",
            1.0,
        ),
    ]


class HfGenerate:
    """Hugging Face's model and its ``generate``: greedy, exactly ``num_new_tokens`` a prompt, padded on the left."""

    def __init__(self, model: Path, dtype: str, num_new_tokens: int) -> None:
        self.num_new_tokens = num_new_tokens
        disable_progress_bar()  # "Loading weights" would fall into our own bar
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        # generate() fills what a call leaves open from here: without an EOS nothing ends a reply early.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=num_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )

    def replies(self, prompts: Sequence[tuple[int, ...]]) -> Replies:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([(0,) * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = self._model.generate(ids, attention_mask=mask)[:, longest:]
        assert out.shape[1] == self.num_new_tokens, f"Hugging Face stopped after {out.shape[1]} tokens"
        return [tuple(reply) for reply in out.tolist()]

    @torch.inference_mode()
    def logits(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """[tokens, vocab]"""
        return self._model(torch.tensor([token_ids])).logits[0].float()


def engine_logits(core: GenerationCore, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """The engine's logits [tokens, vocab] along prompt and reply: the prompt in one pass, then token by token."""
    spec, store = core.decoder.spec, core.cache.own
    core.cache.reserve((1, len(prompt) + len(reply)), (0, 0))
    pieces = []
    start = 0
    for piece in (prompt, *([token] for token in reply)):
        span = RowSpan(0, start, len(piece))
        plan = make_plan(store, [span], spec.num_heads // spec.num_kv_heads, torch.float32, torch.device("cpu"))
        pieces.append(core.decoder.logits(core.decoder.hidden(torch.tensor(piece), plan)))
        start += len(piece)
    return torch.cat(pieces)
