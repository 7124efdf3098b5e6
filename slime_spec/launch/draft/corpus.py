"""The corpus of a draft is the target's own replies, which the embedded engine generates."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer, check_vocabulary
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, RolloutConfig, RunConfig, TaskConfig
from slime_spec.draft.training.progress import Progress
from slime_spec.draft.training.sequence import DraftSequence, as_line, read_corpus
from slime_spec.errors import ConfigError
from slime_spec.files import LineFile
from slime_spec.interfaces import Generation
from slime_spec.launch.draft.chat_prompts import chat_prompts
from slime_spec.launch.draft.conversations import read_conversations
from slime_spec.launch.draft.corpus_settings import MAX_LENGTH, CorpusSettings
from slime_spec.tasks.source import PromptSource
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import GroupRequest, Prompt, SamplingParams

MAX_PROMPT_TOKENS = 512
# Requests queued at the engine beyond those it runs, so that the engine never waits for a request.
NUM_AHEAD = 16


@dataclass(frozen=True)
class PlannedReply:
    """Describes one reply to generate; ``index`` is the number of the reply in the corpus."""

    index: int
    prompt_token_ids: tuple[int, ...]
    kind: str
    seed: int
    params: SamplingParams


def plan_corpus(model: Path, settings: CorpusSettings) -> list[PlannedReply]:
    """Plan the corpus's requests, a pure function of the settings; raises ConfigError for a bad task or file.

    A prompt that is drawn again for a greedy reply is skipped, as its reply would be the same.
    """
    tokenizer = Tokenizer.load(model)
    source = PromptSource(_prompt_config(model, settings), tokenizer, is_scored=False)
    everyday = chat_prompts(settings.seed)
    planned: list[PlannedReply] = []
    greedy_seen: set[tuple[int, ...]] = set()
    for k in range(settings.num_prompts):
        rng = random.Random(f"{settings.seed}/corpus/{k}")
        is_chat, is_greedy = rng.random() < settings.chat_share, rng.random() < settings.greedy_share
        ids = tokenizer.chat(everyday[k % len(everyday)]) if is_chat else source.take(1, k)[0].token_ids
        kind = f"{'chat' if is_chat else 'task'} {'greedy' if is_greedy else 'sampled'}"
        if is_greedy and ids in greedy_seen:
            continue
        if is_greedy:
            greedy_seen.add(ids)
        params = SamplingParams(settings.max_new_tokens, temperature=0.0 if is_greedy else settings.temperature)
        for i in range(1 if is_greedy else settings.samples_per_prompt):
            seed = xxhash.xxh3_64_intdigest(f"{settings.seed}/corpus/{k}/{i}".encode()) >> 1
            planned.append(PlannedReply(len(planned), ids, kind, seed, params))
    return planned


def imported_corpus(model: Path, settings: CorpusSettings) -> list[DraftSequence] | None:
    """Return the replies of the settings' file of conversations; None where the target shall generate them."""
    if settings.conversations is None:
        return None
    tokenizer = Tokenizer.load(model)
    check_vocabulary(tokenizer, ModelSpec.from_folder(model))
    return read_conversations(Path(settings.conversations), tokenizer, settings.max_length or MAX_LENGTH)


def _prompt_config(model: Path, settings: CorpusSettings) -> Config:
    task = TaskConfig(
        names=settings.tasks,
        prompt_data=settings.prompt_data,
        input_key=settings.input_key,
        reward=f"{__name__}:{unscored.__name__}",
    )
    return Config(
        run=RunConfig(seed=settings.seed),
        model=ModelConfig(hf_checkpoint=str(model)),
        task=task,
        rollout=RolloutConfig(max_prompt_len=MAX_PROMPT_TOKENS),
    )


def unscored(prompt: Prompt, reply: str) -> float:
    """Reward nothing: a corpus needs no rewards, and so its rows need no labels."""
    raise AssertionError(f"a draft's corpus is not scored: {prompt} {reply}")


def generate_corpus(
    model: Path, dtype: str, device: str, planned: Sequence[PlannedReply], path: Path, progress: Progress
) -> list[DraftSequence]:
    """Return the planned replies: read those that ``path`` holds, generate the rest and append them to the file.

    Raises ConfigError where ``path`` holds replies to other requests.
    """
    present = _present(path, planned, ModelSpec.from_folder(model).vocab_size)
    missing = [each for each in planned if each.index not in present]
    progress.show("generating", len(present), len(planned))
    if missing:
        engine = EmbeddedEngine(_engine_config(model, dtype, device), 0, RayObjectStoreTransport())
        engine.start()
        try:
            with LineFile(path) as file:
                for sequence in _replies(engine, missing):
                    file.append(as_line(sequence))
                    present[sequence.index] = sequence
                    progress.show("generating", len(present), len(planned))
        finally:
            engine.stop()
    return [present[each.index] for each in planned]


def _engine_config(model: Path, dtype: str, device: str) -> Config:
    return Config(
        model=ModelConfig(hf_checkpoint=str(model)),
        engine=EngineConfig(dtype=dtype),
        rollout=RolloutConfig(num_gpus_per_engine=int(device != "cpu")),
    )


def _replies(engine: EmbeddedEngine, planned: Sequence[PlannedReply]) -> Iterator[DraftSequence]:
    """Yield replies in the planned order, while the engine generates the next replies."""
    running: deque[tuple[PlannedReply, Generation]] = deque()
    waiting = deque(planned)
    limit = EngineConfig().max_running_requests + NUM_AHEAD
    while waiting or running:
        while waiting and len(running) < limit:
            each = waiting.popleft()
            request = GroupRequest(str(each.index), each.prompt_token_ids, (each.seed,), each.params)
            running.append((each, engine.generate(request)))
        each, generation = running.popleft()
        (sample,) = generation
        yield DraftSequence(
            each.index, (*each.prompt_token_ids, *sample.token_ids), len(each.prompt_token_ids), each.kind
        )


def _present(path: Path, planned: Sequence[PlannedReply], vocab_size: int) -> dict[int, DraftSequence]:
    """Read the replies that an earlier run generated for this plan."""
    if not path.is_file():
        return {}
    present = {sequence.index: sequence for sequence in read_corpus(path)}
    prompts = {each.index: (each.prompt_token_ids, each.kind) for each in planned}
    for index, sequence in present.items():
        if max(sequence.token_ids, default=0) >= vocab_size:
            rule = f"reply {index} must have token ids below {vocab_size}"
            raise ConfigError(str(path), rule, max(sequence.token_ids), "Remove its line, or the file.")
        if prompts.get(index) != (sequence.token_ids[: sequence.prompt_len], sequence.kind):
            raise ConfigError(
                "--out",
                f"{path} must hold replies to this command's prompts (reply {index} answers another)",
                str(path.parent),
                "Pass the settings the corpus was started with, or another --out.",
            )
    return present
