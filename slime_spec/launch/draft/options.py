"""Read and check the command line of ``slime-spec draft train`` before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from slime_spec.checkpoints.families.dspark import MARKOV_KINDS
from slime_spec.config.draft_training import LOSSES, POSITION_WEIGHTS, STEP_DECAY, TOP_K, check_loss_settings
from slime_spec.errors import ConfigError
from slime_spec.launch.draft.corpus_settings import CorpusSettings

PROG = "slime-spec draft train"
BLOCK_KINDS = ("dflash", "dspark")
KINDS = ("eagle3", "eagle", "mtp", *BLOCK_KINDS)
DTYPES = ("float32", "bfloat16", "float16")
FETCH = "Pass a model's folder, or make one with: slime-spec models fetch smollm2-135m"
DESCRIPTION = """\
Train a draft for a target on the target's own replies, and write it as a checkpoint that engines load.

Replies and features are kept in OUT and the training's state with them: after a kill, repeat the command with
--resume. The checkpoint, its held-out acceptance and its provenance lie in OUT when the command is done.
`slime-spec draft convert --help` tells how to write a draft in another engine's layout."""


@dataclass(frozen=True)
class DraftOptions:
    """Holds the options of the command; ``minutes`` bounds the training, None lets it run all epochs.

    The shape of a new draft is given; that of a ``draft`` to train on is the draft's own, and None here.
    """

    target: Path
    out: Path
    corpus: CorpusSettings
    draft: str | None
    kind: Literal["eagle3", "eagle", "mtp", "dflash", "dspark"] | None
    capture_layers: tuple[int, ...] | None
    draft_vocab_size: int | None
    intermediate_size: int | None
    num_layers: int | None
    block_size: int | None
    mask_token_id: int | None
    norm_output_convention: str
    markov_rank: int | None
    markov_kind: str | None
    held_out_percent: int
    num_steps: int | None
    epochs: int
    batch_size: int
    lr: float
    loss: str
    loss_top_k: int
    step_decay: float
    position_weights: str
    autocast: bool
    minutes: float | None
    resume: bool
    dtype: str
    draft_dtype: str
    device: str
    json: Path | None

    @property
    def seed(self) -> int:
        return self.corpus.seed


def read_options(argv: Sequence[str]) -> DraftOptions:
    """Read the options; raises ConfigError for a flag, a value or a folder that cannot work."""
    given = _parser().parse_args(argv)
    check_ranges(given, PROG)
    check_corpus(given)
    if not 0 < given.lr < 1:
        raise ConfigError("--lr", "must be above 0 and below 1", given.lr, "Start from the default, 1e-3.")
    if not (given.target / "config.json").is_file():
        raise ConfigError("--target", "must be a checkpoint folder with a config.json", str(given.target), FETCH)
    check_loss_settings(given.loss, given, lambda name: f"--{name.replace('_', '-')}", "--loss")
    _check_folders(given.out, given.json, given.resume)
    _fill_shape(given)
    return DraftOptions(
        target=given.target,
        out=given.out,
        corpus=corpus_of(given),
        capture_layers=None if given.capture_layers is None else tuple(sorted(given.capture_layers)),
        **{name: getattr(given, name) for name in SAME_NAME},
    )


def corpus_of(given: argparse.Namespace) -> CorpusSettings:
    """Return the settings of the corpus that a command line gives."""
    return CorpusSettings(
        tasks=tuple(given.task),
        prompt_data=given.prompt_data,
        input_key=given.input_key,
        num_prompts=given.num_prompts,
        samples_per_prompt=given.samples_per_prompt,
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        greedy_share=given.greedy_share,
        chat_share=given.chat_share,
        seed=given.seed,
        conversations=given.conversations,
        max_length=given.max_length,
    )


def check_ranges(given: argparse.Namespace, prog: str) -> None:
    """Raise ConfigError for a number out of its bounds, of the flags that the command has."""
    for flag, name, least, most in RANGES:
        value = getattr(given, name, None)
        if value is not None and not least <= value <= most:
            bounds = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
            raise ConfigError(flag, f"must be {bounds}", value, f"See {prog} --help.")


def check_corpus(given: argparse.Namespace) -> None:
    """Raise ConfigError for two sources of a corpus, an absent file, and a length that no conversation has."""
    if given.conversations is not None and given.prompt_data is not None:
        rule = "a corpus has one source, and --prompt-data names prompts to generate replies to"
        raise ConfigError("--conversations", rule, given.conversations, "Drop one of the two.")
    if given.conversations is not None and not Path(given.conversations).is_file():
        raise ConfigError("--conversations", "must be a file that is there", given.conversations, "Check the path.")
    if given.conversations is None and given.max_length is not None:
        rule = "is of --conversations; generated replies end after --max-new-tokens"
        raise ConfigError("--max-length", rule, given.max_length, "Drop it.")


# (flag, attribute, least, most)
INF = float("inf")
RANGES: tuple[tuple[str, str, float, float], ...] = (
    ("--num-prompts", "num_prompts", 2, INF),
    ("--samples-per-prompt", "samples_per_prompt", 1, INF),
    ("--max-new-tokens", "max_new_tokens", 4, INF),
    ("--max-length", "max_length", 4, INF),
    ("--num-positions", "num_positions", 1, 127),
    ("--temperature", "temperature", 0.01, INF),
    ("--greedy-share", "greedy_share", 0, 1),
    ("--chat-share", "chat_share", 0, 1),
    ("--held-out-percent", "held_out_percent", 1, 50),
    ("--draft-vocab-size", "draft_vocab_size", 1, INF),
    ("--intermediate-size", "intermediate_size", 1, INF),
    ("--num-layers", "num_layers", 1, 64),
    ("--block-size", "block_size", 2, 128),
    ("--mask-token-id", "mask_token_id", 0, INF),
    ("--markov-rank", "markov_rank", 1, 4096),
    ("--num-steps", "num_steps", 1, 127),
    ("--epochs", "epochs", 1, INF),
    ("--batch-size", "batch_size", 1, INF),
    ("--loss-top-k", "loss_top_k", 1, INF),
    ("--step-decay", "step_decay", 1e-6, 1),
    ("--minutes", "minutes", 0, INF),
    ("--seed", "seed", 0, INF),
)
SAME_NAME = (
    "draft",
    "kind",
    "draft_vocab_size",
    "intermediate_size",
    "num_layers",
    "block_size",
    "mask_token_id",
    "markov_rank",
    "markov_kind",
    "norm_output_convention",
    "held_out_percent",
    "num_steps",
    "epochs",
    "batch_size",
    "lr",
    "loss",
    "loss_top_k",
    "step_decay",
    "position_weights",
    "autocast",
    "minutes",
    "resume",
    "dtype",
    "draft_dtype",
    "device",
    "json",
)


OF_BLOCKS = ("num_layers", "block_size", "mask_token_id", "markov_rank", "markov_kind")
# The shape of a new draft: the flags, and what they are where they are not given.
DRAFT_VOCAB_SIZE = 4096
SHAPE: dict[str, str | int | None] = {
    "kind": "eagle3",
    "draft_vocab_size": DRAFT_VOCAB_SIZE,
    "intermediate_size": None,
    "capture_layers": None,
    **dict.fromkeys(OF_BLOCKS),
}


def _fill_shape(given: argparse.Namespace) -> None:
    """Fill in the shape of a new draft; raises ConfigError for a shape beside a draft that has its own."""
    if given.norm_output_convention is not None and given.draft is None:
        flag = "--draft-norm-output-convention"
        raise ConfigError(
            flag, "is of a draft to train on", given.norm_output_convention, f"Drop {flag}, or pass --draft."
        )
    given.norm_output_convention = given.norm_output_convention or "sglang"
    for flag, value in (("--markov-rank", given.markov_rank), ("--markov-kind", given.markov_kind)):
        if value is not None and given.kind != "dspark":
            raise ConfigError(flag, "is dspark's alone", value, "Drop it, or pass --kind dspark.")
    for name, default in SHAPE.items():
        value = getattr(given, name)
        if given.draft is None:
            setattr(given, name, default if value is None else value)
        elif value is not None and name != "draft_vocab_size":  # a draft without a head has no vocabulary of its own
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(flag, "is that of the draft to train on", value, f"Drop {flag}, or --draft.")
        if name in OF_BLOCKS and given.draft is None and given.kind not in BLOCK_KINDS and value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                flag, "is of block drafters alone", value, f"Drop {flag}, or pass --kind dflash or dspark."
            )


def _check_folders(out: Path, json: Path | None, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError("--out", "must be a folder", str(out), "Pass another --out.")
    started = out.is_dir() and any(out.iterdir())
    if started and not resume:
        raise ConfigError(
            "--out", "must be absent or empty", str(out), "Pass --resume to go on with it, or another --out."
        )
    if resume and not started:
        raise ConfigError("--resume", "needs the folder of a training that was started", str(out), "Drop --resume.")
    if json is not None and not json.parent.is_dir():
        raise ConfigError("--json", "must lie in a folder that is there", str(json), f"Make {json.parent} first.")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG, description=DESCRIPTION, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", type=Path, required=True, help="Hugging Face checkpoint folder of the target")
    add("--out", type=Path, required=True, help="folder of the corpus, the training's state and the checkpoint")
    add("--resume", action="store_true", help="go on with the training that --out holds")
    add("--draft", help="folder of a draft, or builtin:NAME, to train on (default: begin from the target's last block)")
    add(
        "--kind",
        choices=KINDS,
        help="draft to train (eagle3); eagle has no head of its own, mtp is MiMo's format, "
        "dflash and dspark draft a block in one pass",
    )
    add_conventions(add)
    of_corpus = parser.add_argument_group("corpus").add_argument
    add_corpus(of_corpus)
    of_corpus("--held-out-percent", type=int, default=5, help="prompts whose replies only judge the draft (5)")
    _add_network(parser.add_argument_group("network").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)
    return parser


Add = Callable[..., argparse.Action]


def add_conventions(add: Add) -> None:
    """Add the flag that says how the config.json of a draft is meant."""
    add(
        "--draft-norm-output-convention",
        dest="norm_output_convention",
        choices=("sglang", "specforge"),
        help="what norm_output means in the config.json of --draft, as in train (sglang)",
    )


def add_corpus(add: Add, num_prompts: int = CorpusSettings.num_prompts) -> None:
    """Add the flags of a corpus; ``num_prompts`` are asked by default."""
    settings = CorpusSettings()
    add("--task", nargs="+", default=list(settings.tasks), help="tasks in turn, as in train (arithmetic_sentences)")
    add("--prompt-data", help="a file of prompts instead, as in train")
    add("--input-key", default=settings.input_key, help="key of the prompt in --prompt-data (prompt)")
    add("--conversations", help="a jsonl file of conversations (SpecForge's) whose replies are the corpus")
    add("--max-length", type=int, help="tokens of a conversation up to a reply's end (2048)")
    add("--num-prompts", type=int, default=num_prompts, help=f"prompts asked ({num_prompts})")
    add("--samples-per-prompt", type=int, default=settings.samples_per_prompt, help="sampled replies a prompt (1)")
    add("--max-new-tokens", type=int, default=settings.max_new_tokens, help="longest reply (64)")
    add("--temperature", type=float, default=settings.temperature, help="of sampled replies (1.0)")
    add("--greedy-share", type=float, default=settings.greedy_share, help="prompts with one greedy reply (0.5)")
    add("--chat-share", type=float, default=settings.chat_share, help="prompts that are everyday requests (0.05)")


def _add_network(add: Add) -> None:
    add("--draft-vocab-size", type=int, help="most frequent tokens the draft knows (4096)")
    add("--intermediate-size", type=int, help="width of the MLP (default: the target's)")
    add(
        "--capture-layers",
        type=int,
        nargs="+",
        help="target layers read (default: SGLang's choice; spread out in a target of fewer than 7)",
    )
    add("--num-layers", type=int, help="layers of a block drafter (2)")
    add("--block-size", type=int, help="tokens of its block, the root included (8)")
    add("--mask-token-id", type=int, help="token whose embedding stands where it drafts (the vocabulary's last)")
    add("--markov-rank", type=int, help="rank of dspark's bias by the token before (64)")
    add(
        "--markov-kind",
        choices=MARKOV_KINDS,
        help="what else that bias reads: nothing, the state, all before (vanilla)",
    )
    add("--draft-dtype", choices=DTYPES, default="bfloat16", help="dtype of the checkpoint (bfloat16)")


def _add_training(add: Add) -> None:
    add("--num-steps", type=int, help="unrolled steps (5; all of a block)")
    add("--epochs", type=int, default=8, help="passes over the corpus (8)")
    add("--batch-size", type=int, default=8, help="sequences an update (8)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (1e-3)")
    add("--loss", choices=LOSSES, default="soft_ce", help="loss of a step (soft_ce)")
    add("--loss-top-k", type=int, default=TOP_K, help="tokens of the target that top_k_soft_ce learns from (256)")
    add(
        "--step-decay",
        type=float,
        default=STEP_DECAY,
        help="weight of a step's loss over that of the step before (0.8)",
    )
    add(
        "--position-weights",
        choices=POSITION_WEIGHTS,
        default=POSITION_WEIGHTS[0],
        help="decay, by --step-decay, or d_pace (arXiv 2605.18810) with the loss cross_entropy (decay)",
    )
    add("--autocast", action="store_true", help="compute the network in bfloat16; its weights stay fp32")
    add("--minutes", type=float, help="stop training after this long; --resume goes on")
    add("--seed", type=int, default=0, help="seed of prompts, replies, first weights and order (0)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the target's passes (bfloat16)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to generate and train (cpu)")
    add("--json", type=Path, help="write the held-out acceptance here too")


class Parser(argparse.ArgumentParser):
    """Parses with argparse, whose complaints become ConfigErrors, as everywhere on this command line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, "", f"See {self.prog} --help.")
