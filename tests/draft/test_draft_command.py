"""``slime-spec draft train`` from the command line: bad input before any work, and a whole small training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.draft.training.sequence import DraftSequence, as_line, read_corpus
from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.draft.command import run_draft
from slime_spec.launch.draft.corpus import plan_corpus
from slime_spec.launch.draft.corpus_settings import CorpusSettings
from slime_spec.launch.draft.options import read_options
from slime_spec.launch.draft.provenance import file_sha256
from slime_spec.launch.draft.start import draft_spec
from tests.support.tiny_drafts import make_tiny_mimo
from tests.support.tiny_policy import make_tiny_policy

SMALL = ["--num-prompts", "40", "--max-new-tokens", "8", "--epochs", "2", "--draft-vocab-size", "64"]
LAYERS = ["--capture-layers", "0", "1", "2"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy") / "tiny", num_hidden_layers=4)


def command(policy: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--target", str(policy), "--out", str(out), *SMALL, *LAYERS, *more]


BAD = {
    "--num-prompts must be at least 2": ["--num-prompts", "1"],
    "--greedy-share must be from 0 to 1": ["--greedy-share", "1.5"],
    "--lr must be above 0 and below 1": ["--lr", "0"],
    "--draft-vocab-size must be at most 257": ["--draft-vocab-size", "258"],
    "task.names must be one of": ["--task", "nope"],
    "task.prompt_data must be a readable file": ["--prompt-data", "nowhere.jsonl"],
    "--block-size is of block drafters alone": ["--block-size", "4"],
    "--draft-norm-output-convention is of a draft to train on": ["--draft-norm-output-convention", "specforge"],
    "--markov-rank is dspark's alone": ["--kind", "dflash", "--markov-rank", "4"],
    "--num-steps must be at most 3, what blocks of 4 tokens draft": [
        "--kind",
        "dflash",
        "--block-size",
        "4",
        "--num-steps",
        "4",
    ],
    "mask_token_id must be a row of the target's embedding": ["--kind", "dflash", "--mask-token-id", "257"],
    "--capture-layers must read layers before the last": ["--capture-layers", "0", "3"],
    "must be different layers of the target": ["--capture-layers", "0", "1", "4"],
    "--json must lie in a folder that is there": ["--json", "nowhere/report.json"],
    "--resume needs the folder of a training": ["--resume"],
    "invalid choice: 'medusa'": ["--kind", "medusa"],
    "--loss-top-k has no effect on the loss soft_ce": ["--loss-top-k", "8"],
    "--position-weights are of the loss cross_entropy": ["--position-weights", "d_pace"],
    "--step-decay has no effect beside": [
        *("--loss", "cross_entropy", "--position-weights", "d_pace", "--step-decay", "0.5"),
    ],
    "--step-decay must be from": ["--step-decay", "0"],
    "unrecognized arguments: --learning-rate": ["--learning-rate", "1"],
    "--num-prompts must give prompts to learn from": ["--num-prompts", "2"],
}


@pytest.mark.parametrize(("rule", "flags"), BAD.items(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_is_written(
    policy: Path, tmp_path: Path, rule: str, flags: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_draft(command(policy, tmp_path / "out", *flags))
    assert rule in f"{caught.value.setting} {caught.value.rule}"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to train on")
def test_cuda_is_refused_where_there_is_none(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cuda needs a GPU"):
        run_draft(command(policy, tmp_path / "out", "--device", "cuda"))


def test_a_folder_that_holds_something_is_not_written_into(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--out: must be absent or empty"):
        run_draft(command(policy, tmp_path))
    with pytest.raises(ConfigError, match="--target: must be a checkpoint folder"):
        run_draft(["train", "--target", str(tmp_path), "--out", str(tmp_path / "out")])


def test_another_action_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draft", "trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["draft", "train", "--help"])
    assert left.value.code == 0
    assert "--draft-vocab-size" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "mtp", "dflash", "dspark"])
def test_a_whole_training_leaves_a_draft_with_its_table_and_provenance(
    kind: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    assert run_draft(command(policy, out, "--kind", kind, "--json", str(report), "--minutes", "0")) == 0
    assert "after 0 of" in capsys.readouterr().err
    again = ["--kind", kind, "--json", str(report), "--resume", "--draft-dtype", "float16"]
    assert run_draft(command(policy, out, *again)) == 0
    assert "held-out replies" in capsys.readouterr().err

    target = ModelSpec.from_folder(policy)
    draft = load_draft(out, DraftSpec.from_folder(out, target))
    assert {tensor.dtype for tensor in draft.tensors.values()} == {torch.float16}
    record = json.loads((out / "provenance.json").read_text())
    assert record["sha256"]["model.safetensors"] == file_sha256(out / "model.safetensors")
    assert record["training"]["updates"] == record["training"]["updates_planned"] > 0
    assert record["command"].startswith("slime-spec draft train --target")
    assert record["held_out"] == json.loads(report.read_text()) == json.loads((out / "held_out.json").read_text())
    corpus = list(read_corpus(out / "corpus.jsonl"))
    learned, held_out = record["corpus"]["num_sequences"], record["corpus"]["num_held_out_sequences"]
    assert learned > 0
    assert held_out > 0
    assert learned + held_out <= len(corpus)
    if kind == "eagle3":
        tables = load_file(out / "model.safetensors")
        offsets = tables["d2t"] + torch.arange(64)
        assert torch.equal(offsets, tables["t2d"].nonzero().flatten())


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "mtp", "dflash", "dspark"])
def test_a_draft_is_trained_on(kind: str, policy: Path, tmp_path: Path) -> None:
    first, again, on = tmp_path / "first", tmp_path / "again", tmp_path / "on"
    same = ["--draft-dtype", "float32", "--kind", kind]
    assert run_draft(command(policy, first, *same)) == 0
    trained = ["train", "--target", str(policy), *SMALL[:4], "--draft", str(first), "--draft-dtype", "float32"]
    assert run_draft([*trained, "--out", str(again), "--minutes", "0"]) == 0
    assert tensors_of(again) == tensors_of(first)
    assert (again / "config.json").read_text() == (first / "config.json").read_text()
    assert (again / "held_out.json").read_text() == (first / "held_out.json").read_text()
    assert run_draft([*trained, "--out", str(on), "--epochs", "1"]) == 0
    before, after = load_file(first / "model.safetensors"), load_file(on / "model.safetensors")
    assert {name for name in before if torch.equal(before[name], after[name])} == {"d2t", "t2d"} & before.keys()
    record = json.loads((on / "provenance.json").read_text())
    assert record["draft"]["name"] == str(first)
    assert "licences of target and draft" in record["licence"]
    with pytest.raises(ConfigError, match=r"^--draft: must be what .* was started with"):
        run_draft([*trained[:-3], str(on), "--draft-dtype", "float32", "--out", str(again), "--resume"])


@pytest.mark.parametrize(
    "flags",
    [
        {"loss": "top_k_soft_ce", "loss_top_k": 8, "step_decay": 0.5},
        {"loss": "cross_entropy", "position_weights": "d_pace"},
    ],
    ids=["top-k", "d-pace"],
)
def test_a_loss_is_trained_by_with_what_it_reads(flags: dict[str, object], policy: Path, tmp_path: Path) -> None:
    """The weights are those of a training without the flags only where a flag never reached the trainer."""
    given = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    plain = ["--loss", str(flags["loss"])]
    for out, words in (("plain", plain), ("given", given)):
        assert run_draft(command(policy, tmp_path / out, *words)) == 0
    record = json.loads((tmp_path / "given" / "provenance.json").read_text())["training"]
    assert {name: record[name] for name in flags} == flags
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("given", "plain"))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_small_block_is_judged_as_far_as_it_reaches(policy: Path, tmp_path: Path) -> None:
    assert run_draft(command(policy, tmp_path / "out", "--kind", "dflash", "--block-size", "2", "--epochs", "1")) == 0
    record = json.loads((tmp_path / "out" / "held_out.json").read_text())
    assert {len(each["acceptance_rate"]) for each in record.values()} == {1}


def test_a_layer_of_the_targets_checkpoint_is_trained_in_runs_alone(tmp_path: Path) -> None:
    target = make_tiny_mimo(tmp_path / "mimo")
    argv = ["train", "--target", str(target), "--out", str(tmp_path / "on"), "--draft", str(target)]
    with pytest.raises(ConfigError, match=r"--draft: is a draft that no folder of its own can hold.*--enable-draft"):
        run_draft(argv)


def test_a_training_begun_before_steps_had_a_default_of_their_own_is_resumed(policy: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "settings.json"
    assert run_draft(command(policy, tmp_path / "out", "--minutes", "0")) == 0
    known = json.loads(path.read_text())
    assert known["num_steps"] == 5
    newer = ("draft_checksum", "norm_output_convention", "num_layers", "block_size", "mask_token_id")
    newer += ("markov_rank", "markov_kind")
    path.write_text(json.dumps({name: value for name, value in known.items() if name not in newer}))
    assert run_draft(command(policy, tmp_path / "out", "--minutes", "0", "--resume")) == 0


def tensors_of(folder: Path) -> dict[str, list[object]]:
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_a_draft_to_train_on_has_its_own_shape_and_must_be_of_one_layer(policy: Path, tmp_path: Path) -> None:
    assert run_draft(command(policy, tmp_path / "first", "--minutes", "0")) == 0
    for flag, value in {"--kind": "eagle3", "--draft-vocab-size": "64", "--capture-layers": "0"}.items():
        argv = ["train", "--target", str(policy), "--out", str(tmp_path / "on"), flag, value]
        with pytest.raises(ConfigError, match=f"^{flag}: is that of the draft to train on"):
            run_draft([*argv, "--draft", str(tmp_path / "first")])
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    (tmp_path / "first" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    argv = ["train", "--target", str(policy), "--out", str(tmp_path / "on"), "--draft"]
    with pytest.raises(ConfigError, match=r"^--draft: is a draft that cannot be trained: 2 layers"):
        run_draft([*argv, str(tmp_path / "first")])
    with pytest.raises(ConfigError, match="must be one of"):
        run_draft([*argv, "builtin:nothing"])
    assert not (tmp_path / "on").exists()


CHANGED = {
    "--temperature": "0.5",
    "--seed": "1",
    "--num-prompts": "41",
    "--task": "add10",
    "--kind": "mtp",
    "--draft-vocab-size": "65",
    "--intermediate-size": "32",
    "--capture-layers": "2",
    "--dtype": "float32",
    "--num-steps": "2",
    "--lr": "0.1",
}


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [
        (1, (0,)),
        (2, (0,)),
        (3, (0, 1)),
        (4, (0, 1, 2)),
        (5, (0, 2, 3)),
        (6, (0, 2, 4)),
        (7, (1, 2, 3)),
        (30, (1, 14, 26)),
    ],
)
def test_a_shallow_target_has_capture_layers_by_default_too(
    policy: Path, tmp_path: Path, num_layers: int, layers: tuple[int, ...]
) -> None:
    argv = ["train", "--target", str(policy), "--out", str(tmp_path / "out"), *SMALL]
    target = replace(ModelSpec.from_folder(policy), num_layers=num_layers)
    spec = draft_spec(read_options(argv[1:]), target)
    assert spec.capture_layers == layers
    assert spec.feature_size == len(layers) * target.hidden_size


def test_a_training_is_gone_on_with_under_its_own_settings_only(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_draft(command(policy, out, "--minutes", "0")) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for flag, value in CHANGED.items():
        with pytest.raises(ConfigError, match=f"^{flag}: must be what .* was started with"):
            run_draft(command(policy, out, "--resume", flag, value))
    other = make_tiny_policy(tmp_path / "other", num_hidden_layers=4, rope_theta=20000.0, initializer_range=0.1)
    with pytest.raises(ConfigError, match=r"^--target: must be what"):
        run_draft(command(other, out, "--resume"))
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"--resume: needs a folder with the settings.json"):
        run_draft(command(policy, tmp_path / "stray", "--resume"))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_corpus_of_other_prompts_is_not_gone_on_with(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_draft(command(policy, out, "--minutes", "0")) == 0
    (out / "corpus.jsonl").write_text(as_line(DraftSequence(0, (1, 2, 3), 2, "task greedy")) + "\n")
    with pytest.raises(ConfigError, match="must hold replies to this command's prompts"):
        run_draft(command(policy, out, "--resume"))
    (out / "corpus.jsonl").write_text(as_line(DraftSequence(0, (1, 2, 99_999), 2, "task greedy")) + "\n")
    with pytest.raises(ConfigError, match="reply 0 must have token ids below 257"):
        run_draft(command(policy, out, "--resume"))


BROKEN = (
    "{}",
    "[]",
    "{",
    '{"index": 4, "token_ids": [1, 2], "prompt_len": 3, "kind": "k"}',
    '{"index": 4, "token_ids": [1, -2], "prompt_len": 1, "kind": "k"}',
    '{"index": 4, "token_ids": [1, 2.0], "prompt_len": 1, "kind": "k"}',
    '{"index": 4, "token_ids": [1, true], "prompt_len": 1, "kind": "k"}',
    '{"index": NaN, "token_ids": [1, 2], "prompt_len": 1, "kind": "k"}',
    '{"index": Infinity, "token_ids": [1, 2], "prompt_len": 1, "kind": "k"}',
    '{"index": 4, "token_ids": "12", "prompt_len": 1, "kind": "k"}',
    '{"index": 4, "token_ids": [1, 2], "prompt_len": 1, "kind": "\\ud83d"}',
    '{"index": 4, "token_ids": [1, %s], "prompt_len": 1, "kind": "k"}' % ("9" * 5000),
)


def test_a_line_that_a_kill_cut_short_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    path, whole = tmp_path / "corpus.jsonl", as_line(DraftSequence(4, (1, 2, 3), 1, "task greedy")) + "\n"
    path.write_text(whole + whole[:20])
    assert [each.index for each in read_corpus(path)] == [4]
    for broken in BROKEN:
        path.write_text(whole + broken + "\n" + whole)
        with pytest.raises(ConfigError, match=r"corpus.jsonl:2: must be"):
            list(read_corpus(path))


def test_the_plan_mixes_tasks_and_chat_greedy_and_sampled_and_is_the_same_every_time(policy: Path) -> None:
    settings = CorpusSettings(num_prompts=400, samples_per_prompt=2, greedy_share=0.5, chat_share=0.25)
    plan = plan_corpus(policy, settings)
    assert plan_corpus(policy, settings) == plan
    assert [each.index for each in plan] == list(range(len(plan)))
    greedy = [each for each in plan if each.params.temperature == 0]
    assert len({each.prompt_token_ids for each in greedy}) == len(greedy)
    sampled = [each for each in plan if each.params.temperature == 1]
    assert len({each.seed for each in sampled}) == len(sampled)
    chat = {each.prompt_token_ids for each in plan if each.kind.startswith("chat")}
    prompts = {each.prompt_token_ids for each in plan}
    # Of 400 prompts 100 are chat: 60 to 140 is more than four standard deviations either way; tasks repeat some.
    assert 60 < len(chat) < 140
    assert len(prompts - chat) > 100
    assert Tokenizer.load(policy).decode(next(iter(chat)))


def test_prompts_may_come_from_a_file_without_answers(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No reward is tried on them."""
    lines = [json.dumps({"question": f"Say {i}."}) for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    settings = CorpusSettings(
        prompt_data=str(tmp_path / "prompts.jsonl"), input_key="question", num_prompts=10, chat_share=0.0
    )
    tokenizer = Tokenizer.load(policy)
    assert {each.prompt_token_ids for each in plan_corpus(policy, settings)} == {
        tokenizer.chat(f"Say {i}.") for i in range(5)
    }
    assert not caplog.records
