"""Every ServerArgs flag of the pinned SGLang is accepted, typed and checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import read_arguments
from slime_spec.launch.compose import compose
from slime_spec.launch.flags import flags
from slime_spec.sglang.flags import RENAMED, SglangFlag, sglang_flags, sglang_version, typed_elsewhere

SAMPLES = {"str": "text", "int": "3", "suffixed_int": "4k", "float": "0.5", "json": '{"a": [1, 2]}'}
PARSED = {"str": "text", "int": 3, "suffixed_int": 4000, "float": 0.5, "json": {"a": (1, 2)}}


def test_the_table_is_the_pinned_versions() -> None:
    setup = (Path(__file__).resolve().parents[2] / "setup.py").read_text()
    assert re.search(r"sglang==([\d.]+)", setup)[1] == sglang_version()
    assert len(sglang_flags()) > 300


def own_flags() -> list[SglangFlag]:
    return [entry for dest, entry in sglang_flags().items() if dest not in typed_elsewhere()]


@pytest.mark.parametrize("entry", own_flags(), ids=lambda entry: entry.dest)
def test_every_spelling_of_every_flag_takes_a_sample_value(entry: SglangFlag) -> None:
    text = str(entry.choices[0]) if entry.choices else SAMPLES.get(entry.type, "")
    expected = entry.choices[0] if entry.choices else PARSED.get(entry.type, True)
    if entry.is_list:
        expected = (expected, expected)
    for name in entry.flags:
        spelled = f"--sglang-{name[2:]}"
        tokens = [spelled] if entry.type == "bool" else [spelled, *([text] * (2 if entry.is_list else 1))]
        assert read_arguments(tokens).settings == {entry.path: expected}


@pytest.mark.parametrize("entry", own_flags(), ids=lambda entry: entry.dest)
def test_every_typed_flag_refuses_a_value_of_another_type(entry: SglangFlag) -> None:
    wrong = "\x01 nothing takes this {"
    if entry.type == "str" and not entry.choices:
        assert read_arguments([f"--sglang-{entry.flags[0][2:]}={wrong}"]).settings  # any text is a text
        return
    with pytest.raises(ConfigError) as caught:
        read_arguments([f"--sglang-{entry.flags[0][2:]}={wrong}"])
    assert caught.value.setting == entry.path


def test_a_shell_sequence_of_graph_sizes_is_one_list() -> None:
    sizes = (*range(1, 33), *range(40, 65, 8))
    argv = ["--sglang-cuda-graph-bs", *map(str, sizes), "--lr", "1e-6"]
    assert compose(argv).sglang == {"cuda_graph_bs_decode": sizes}


def test_spellings_that_the_pinned_version_renamed_still_work() -> None:
    names = {name for entry in sglang_flags().values() for name in entry.flags}
    assert set(RENAMED) | set(RENAMED.values()) <= names


def test_every_speculative_flag_works_without_the_prefix() -> None:
    prefixed = [name for name in flags() if name.startswith("--sglang-speculative-")]
    assert len(prefixed) > 30
    for name in prefixed:
        assert flags()[name.replace("--sglang-", "--")] == flags()[name]


SPECULATIVE = [
    "accept_threshold_acc",
    "accept_threshold_single",
    "algorithm",
    "draft_model_path",
    "draft_model_quantization",
    "eagle_topk",
    "ngram_capacity",
    "ngram_external_corpus_max_tokens",
    "ngram_external_corpus_path",
    "ngram_external_sam_budget",
    "ngram_match_type",
    "ngram_max_bfs_breadth",
    "ngram_max_trie_depth",
    "ngram_min_bfs_breadth",
    "num_draft_tokens",
    "num_steps",
    "token_map",
    "use_rejection_sampling",
]


def test_flags_that_the_tree_holds_are_set_in_the_tree_and_nowhere_else() -> None:
    assert typed_elsewhere() == {
        "context_length": "engine.context_length",
        "disable_radix_cache": "engine.disable_radix_cache",
        "dtype": "engine.dtype",
        "max_running_requests": "engine.max_running_requests",
        "max_total_tokens": "engine.max_total_tokens",
        "host": "sglang_server.host",
        "port": "sglang_server.port",
        "config": "sglang_server.overrides",  # slime's meaning of --sglang-config: flags of single engines
        **{f"speculative_{name}": f"speculative.{name}" for name in SPECULATIVE},
    }
    assert compose(["--sglang-max-running-requests", "3"]).sglang == {}


def test_a_switch_of_sglang_can_be_switched_off() -> None:
    for spelling in ("--sglang-no-enable-metrics", "--no-sglang-enable-metrics", "--sglang-enable-metrics=false"):
        assert compose(["--sglang-enable-metrics", spelling]).sglang == {"enable_metrics": False}


def test_a_bad_choice_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="prefill, decode"):
        compose(["--speculative-attention-mode", "both"])


def test_a_flag_whose_value_is_optional_leaves_an_override_alone() -> None:
    assert compose(["--sglang-model-checksum", "trainer.lr=0.5"]) == compose(["--lr=0.5", "--sglang-model-checksum="])
    assert compose(["--sglang-model-checksum", "sums.json"]).sglang == {"model_checksum": "sums.json"}


def test_a_list_flag_needs_a_value() -> None:
    with pytest.raises(ConfigError, match="needs a value"):
        compose(["--sglang-cuda-graph-bs", "--lr", "1"])
