"""The benchmark of the embedded engine measures its speed, other engines' speed, and speculation's gain and cost."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import torch

from slime_spec.bench.device.random_model import SHAPES as MODEL_SHAPES
from slime_spec.bench.drafts import CHAINS, SHAPES, chosen_shapes, eagle3_config
from slime_spec.bench.local_engine import check_num_gpus
from slime_spec.bench.peers.catalogue import PEERS
from slime_spec.bench.peers.install import add_peer_flags, install
from slime_spec.bench.rows import Benchmark, BenchOptions
from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import ConfigError
from slime_spec.interfaces import unknown_choice

HERE = "slime_spec.bench"
PARTS = {
    "plain": f"{HERE}.plain:measure",
    "peers": f"{HERE}.against_peers:measure",
    "eagle3": f"{HERE}.eagle3:measure",
    "draft_temperature": f"{HERE}.draft_temperature:measure",
    "lookup": f"{HERE}.advice:measure",
    "cost": f"{HERE}.cost:measure",
    "rounds": f"{HERE}.round_costs:measure",
    "exactness": f"{HERE}.exactness:measure",
}
ON_THE_CPU = {"peers": "they are CPU engines", "draft_temperature": "its races run on the CPU"}
MOST_PROMPTS = 128  # more than any part has
NEED_THE_DRAFT = {"peers", "eagle3", "draft_temperature", "cost", "rounds", "exactness"}


def prepare(options: BenchOptions) -> None:
    """See Benchmark; by default one thread computes, as in every peer."""
    for part, why in ON_THE_CPU.items():
        if options.num_gpus and part in options.parts:
            ours = " ".join(each for each in options.parts if each not in ON_THE_CPU) or "plain"
            raise ConfigError("--only", f"must leave out {part} on a GPU: {why}", part, f"Pass --only {ours}.")
    check_num_gpus(options.num_gpus)
    chosen_shapes(options)
    if options.model_shape is None:
        target = ModelSpec.from_folder(options.model)
        if NEED_THE_DRAFT & set(options.parts):
            choose_draft(eagle3_config(options, "float32", CHAINS[0]), target)
    else:
        _check_model_shape(options)
    torch.set_num_threads(options.threads or 1)
    if options.install_peers:
        for peer in PEERS.values():
            install(peer, options.peers.expanduser())


def _check_model_shape(options: BenchOptions) -> None:
    """Refuse an unknown shape, and what random weights cannot measure: every part but their costs, and gains."""
    assert options.model_shape is not None, "the caller has looked"
    if options.model_shape not in MODEL_SHAPES:
        raise unknown_choice("--model-shape", MODEL_SHAPES, options.model_shape)
    if options.parts != ("cost",):
        rule, value = "has random weights, of which part cost alone says anything", options.model_shape
        raise ConfigError("--model-shape", rule, value, "Pass --only cost, or leave out --model-shape.")
    if options.chart is not None:
        rule = "is drawn from accept lengths, which random weights do not have"
        raise ConfigError("--chart", rule, str(options.chart), "Leave out --chart or --model-shape.")


def add_flags(parser: ArgumentParser) -> None:
    """See Benchmark."""
    parser.add_argument("--threads", metavar="N", type=int, help="compute threads of every engine (1)")
    parser.add_argument("--num-gpus", metavar="N", type=int, help="1: this engine and Hugging Face run on the GPU (0)")
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        metavar="N",
        type=int,
        help="sequences at once, instead of each part's own (peers: always its own; exactness: the largest)",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), help="instead of each part's own, which are both"
    )
    shapes = " ".join(shape.name for shape in SHAPES)
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help=f"drafts of part eagle3, and of cost the chains ({shapes})"
    )
    parser.add_argument(
        "--model-shape",
        metavar="NAME",
        help="of part cost: an engine of this shape with random weights, target and draft, in place of --model and "
        f"--draft: {', '.join(MODEL_SHAPES)}",
    )
    parser.add_argument(
        "--num-prompts", metavar="N", type=int, help="of parts exactness, eagle3 and draft_temperature: at most so many"
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        help="of parts plain, eagle3, exactness: then begin no measurement more (no limit)",
    )
    parser.add_argument("--draft", metavar="DRAFT", help=f"the EAGLE-3 draft that is measured ({BenchOptions.draft})")
    add_peer_flags(parser)
    parser.add_argument("--chart", type=Path, help="draw speed-up over batch size into this SVG file (part cost)")


ENGINE_SPEED = Benchmark(
    what="Speed of the embedded engine: against Hugging Face, vLLM and llama.cpp, and of speculation against none.",
    parts=PARTS,
    prepare=prepare,
    add_flags=add_flags,
    defaults=BenchOptions(num_rounds=3, num_new_tokens=128, num_gpus=0, batch_sizes=(), num_prompts=MOST_PROMPTS),
)
