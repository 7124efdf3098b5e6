"""What the page says of runs: their own numbers, nothing of theirs as HTML, and whatever a folder lacks left out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.folder_lock import FolderLock, is_held
from slime_spec.report.charts import charts_of
from slime_spec.report.folder import distinct_names, read_run, read_runs
from slime_spec.report.measured import read_measured
from slime_spec.report.numbers import shown
from slime_spec.report.page import MOST_VALUES, Page, html
from slime_spec.report.samples import NUM_PROMPTS, ends_of_samples, shortened_middle
from slime_spec.report.series import ChartData, Line, thinned
from tests.support.report_runs import FROZEN, NONE_CONFIG, ONLINE, row, run_folder, sample

NOW = datetime(2026, 1, 2, tzinfo=UTC)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \" ' <!-- \u2028 {{ 7 * 7 }}"


class Elements(HTMLParser):
    """The elements and texts of a page, as a browser parses it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(*folders: Path) -> str:
    return html(Page(read_runs(folders)), NOW)


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def chart(text: str, title: str) -> Any:
    (found,) = [each for each in data_of(text)["charts"] if each["title"] == title]
    return found


def named(charts: list[tuple[str, list[ChartData]]], title: str) -> ChartData:
    (found,) = [each for _, section in charts for each in section if each.title == title]
    return found


def cells(text: str, metric: str) -> list[float]:
    """The exact figures of the first table's line of a metric."""
    found = re.search(rf'<tr data-metric="{re.escape(metric)}">(.*?)</tr>', text, re.DOTALL)
    assert found is not None
    return [float(value) for value in re.findall(r'<data value="([^"]+)">', found[1])]


def test_charts_and_tables_have_the_values_of_metrics_jsonl(tmp_path: Path) -> None:
    rows = [row(step) for step in range(8)]
    text = page_of(run_folder(tmp_path / "mine", rows, FROZEN))
    reward = chart(text, "Reward")["lines"][0]
    assert (reward["start"], reward["every"]) == (0, 1)
    assert reward["y"] == [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125]
    accepted, break_even = chart(text, "Accepted length and break-even")["lines"]
    assert (accepted["dashed"], break_even["dashed"]) == (False, True)
    assert break_even["y"] == [2.5] * 8
    assert chart(text, "Net speed-up of decoding")["lines"][0]["low"] == [
        0.85,
        0.95,
        1.05,
        1.15,
        1.25,
        1.35,
        1.45,
        1.55,
    ]
    # The first four steps of eight, the last four, the last.
    assert cells(text, "rollout/reward_mean") == [0.4375, 0.9375, 1.125]
    assert cells(text, "rollout/response_len_mean") == [28.5, 24.5, 23.0]


def test_who_cannot_see_a_chart_hears_what_it_shows(tmp_path: Path) -> None:
    rows = [row(0, train__grad_norm=None), row(1), row(2)]
    text = page_of(run_folder(tmp_path / "mine", rows[:1]), run_folder(tmp_path / "more", rows))
    labels = [each["aria-label"] for _, each in Elements(text).tags if each.get("role") == "img"]
    assert "Reward: mine, 0.25 at 0; more, from 0.25 at 0 to 0.5 at 2, between 0.25 and 0.5" in labels
    assert "Gradient norm: mine, no finite value; more, from 1.5 at 1 to 1.5 at 2, between 1.5 and 1.5" in labels


def test_every_metric_is_drawn_and_in_a_table_also_one_that_this_version_does_not_know(tmp_path: Path) -> None:
    text = page_of(run_folder(tmp_path / "mine", [row(0, new__metric=3.25, train__num_tokens=758.0)], FROZEN))
    assert chart(text, "new/metric")["lines"][0]["y"] == [3.25]
    assert chart(text, "train/num_tokens")["lines"][0]["y"] == [758]
    for name in row(0):
        if name != "step":
            assert cells(text, name)[2] == row(0)[name], name


def test_the_phases_of_a_step_add_up_to_it_and_training_the_draft_is_no_part_of_training(tmp_path: Path) -> None:
    text = page_of(run_folder(tmp_path / "mine", [row(0), row(1)], ONLINE))
    phases = {line["label"]: line["y"] for line in chart(text, "Phases of a step")["lines"]}
    assert phases == {
        "rollout": [2, 2],
        "train": [4, 4],
        "train the draft": [1, 1],
        "push": [0.5, 0.5],
        "other": [0.5, 0.5],
    }


def test_acceptance_by_position_is_pooled_over_the_steps_by_their_rounds(tmp_path: Path) -> None:
    text = page_of(run_folder(tmp_path / "mine", [row(0), row(1)], FROZEN))
    (line,) = chart(text, "Acceptance by draft position")["lines"]
    # 100 rounds and 200: (100 * 0.5 + 200 * 0.6) / 300, (100 * 0.25 + 200 * 0.35) / 300
    assert line["y"] == pytest.approx([170 / 300, 95 / 300], rel=1e-5)


def test_acceptance_by_age_counts_versions_back_from_the_newest(tmp_path: Path) -> None:
    rows = [row(9, **{"spec__accept_length_by_version/9": 4.0})]
    text = page_of(run_folder(tmp_path / "mine", rows, FROZEN))
    lines = {line["label"]: line["y"] for line in chart(text, "Acceptance by age of the weights")["lines"]}
    assert lines == {"newest weights": [4], "2 behind": [3.5]}


def test_three_runs_are_drawn_by_what_drafts_in_them(tmp_path: Path) -> None:
    configs = {"plain": NONE_CONFIG, "still": FROZEN, "learning": ONLINE}
    folders = [run_folder(tmp_path / name, [row(0), row(1)], config) for name, config in configs.items()]
    text = page_of(*folders)
    lines = chart(text, "Accepted length: no draft, frozen draft, online draft")["lines"]
    assert [(line["run"], line["label"], line["y"]) for line in lines] == [
        (0, "no draft", [1, 1]),
        (1, "frozen draft", [2, 2.25]),
        (2, "online draft", [2, 2.25]),
    ]
    assert "Accepted length: " not in page_of(folders[1])


def test_an_evaluation_has_its_interval_and_pass_at_k_and_no_step_of_its_own(tmp_path: Path) -> None:
    def evaluated(step: int) -> dict[str, float | None]:
        accuracy = {"eval/aime/accuracy": 0.5, "eval/aime/accuracy_low": 0.25, "eval/aime/accuracy_high": 0.75}
        passed = {"eval/aime/pass@1": 0.5, "eval/aime/pass@16": 0.9, "eval/aime/pass@2": 0.6}
        return {"step": step, "eval/aime": 0.5, **accuracy, **passed}

    rows = [{**row(0), **evaluated(0)}, *(row(step) for step in range(1, 4)), evaluated(4)]
    text = page_of(run_folder(tmp_path / "mine", rows))
    (line,) = chart(text, "aime: accuracy")["lines"]
    assert (line["every"], line["y"], line["low"], line["high"]) == (4, [0.5, 0.5], [0.25, 0.25], [0.75, 0.75])
    lines = chart(text, "aime: pass@k")["lines"]
    assert [(line["label"], line["y"][0]) for line in lines] == [("pass@1", 0.5), ("pass@2", 0.6), ("pass@16", 0.9)]
    assert "4 of 4 steps, finished" in text, "the row after the last step is no step"
    assert cells(text, "rollout/reward_mean") == [0.3125, 0.5625, 0.625], "and counts in no mean"


def test_runs_of_other_lengths_and_metrics_keep_their_own_steps(tmp_path: Path) -> None:
    evaluated = [row(0, **{"eval__gsm8k/accuracy": 0.5}), row(1), row(2, **{"eval__gsm8k/accuracy": None})]
    first = run_folder(tmp_path / "first", evaluated)
    second = run_folder(tmp_path / "second", [row(5)])
    text = page_of(first, second)
    assert [(line["run"], line["start"], len(line["y"])) for line in chart(text, "Reward")["lines"]] == [
        (0, 0, 3),
        (1, 5, 1),
    ]
    (line,) = chart(text, "gsm8k: accuracy")["lines"]
    assert (line["start"], line["every"], line["y"]) == (0, 2, [0.5, None])
    assert "not finite" in text


@pytest.mark.parametrize("where", ["prompt", "reply", "answer", "error"])
def test_a_text_of_a_sample_stays_a_text(where: str, tmp_path: Path) -> None:
    reward = None if where == "error" else 1.0
    hostile = [sample(0, 1, **{where: HOSTILE, "reward": reward}), sample(3, 2)]
    text = page_of(run_folder(tmp_path / "mine", [row(0)], samples=hostile))
    page = Elements(text)
    assert [tag for tag, _ in page.tags].count("script") == 3, "the data, uPlot and the page's own"
    assert not [attributes for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    assert HOSTILE in "\n".join(page.texts)


def test_names_and_settings_of_a_run_are_texts_too(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "<b>&'\"", [row(0)], Config())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "eval/<script>": 1.0}) + "\n")
    (folder / "config.yaml").write_text(json.dumps({"run": {"name": HOSTILE}, "own": {"key": [1, "<i>"]}}))
    (folder / "command.txt").write_text(HOSTILE)
    text = page_of(folder)
    page = Elements(text)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not {"i", "img"} & {tag for tag, _ in page.tags}
    assert data_of(text)["runs"] == ["<b>&'\""]
    assert page.texts.count(HOSTILE) == 3, "the setting in both tables, and the command"


def test_the_page_names_no_address_and_allows_its_own_scripts_alone(tmp_path: Path) -> None:
    text = page_of(run_folder(tmp_path / "mine", [row(0)]))
    tags = Elements(text).tags
    (policy,) = [each["content"] or "" for tag, each in tags if tag == "meta" and "http-equiv" in each]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert re.fullmatch(r"( 'sha256-[A-Za-z0-9+/]+='){2}", re.findall(r"script-src([^;]+);", policy)[0])
    for tag, attributes in tags:
        for name in ("src", "href", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "@import" not in text
    assert "url(" not in text


def test_settings_are_shown_where_they_are_no_defaults_and_marked_where_runs_differ(tmp_path: Path) -> None:
    text = page_of(run_folder(tmp_path / "a", [row(0)], FROZEN), run_folder(tmp_path / "b", [row(0)], ONLINE))
    first_table = text[text.index('id="configuration"') : text.index("Every setting")]
    marked = re.findall(r'data-setting="([^"]+)" class="differs"', first_table)
    assert marked == ["draft_training.enable"]
    plain = re.findall(r'data-setting="([^"]+)">', first_table)
    assert plain == ["run.num_rollout", "speculative.algorithm", "speculative.draft_model_path"]


def test_the_first_and_the_last_steps_samples_are_read_and_not_what_lies_between(tmp_path: Path) -> None:
    rows = [sample(step, prompt, index) for step in range(50) for prompt in range(9) for index in range(2)]
    folder = run_folder(tmp_path / "mine", [row(0)], samples=rows)
    file = folder / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-1] + b'\n{"rollout_id": 50, "prompt_id": 1')
    first, last = ends_of_samples(file)
    assert [each.step for each in first] == [0] * NUM_PROMPTS
    assert [each.step for each in last] == [49] * NUM_PROMPTS
    assert [each.prompt for each in last] == [f"What is {prompt} + 1?" for prompt in range(NUM_PROMPTS)]
    assert (first[0].accept_length, first[0].num_tokens, first[0].reward) == (7 / 3, 7, 1.0)
    assert ends_of_samples(tmp_path / "none.jsonl") == ()


def test_lines_of_samples_longer_than_a_block_are_read_from_the_end(tmp_path: Path) -> None:
    long = [sample(step, 1, reply=f"{step}" * (3 << 20)) for step in range(3)]
    (last,) = ends_of_samples(run_folder(tmp_path / "mine", [row(0)], samples=long) / "samples.jsonl")[1]
    assert last.reply.startswith("22222\n"[:5])
    assert "characters left out" in last.reply


def test_a_long_text_keeps_its_ends() -> None:
    assert shortened_middle("abcdefgh", 4) == "ab\n[4 characters left out]\ngh"
    assert shortened_middle("abcd", 4) == "abcd"


def test_a_run_that_is_writing_its_line_and_one_without_a_step_are_shown(tmp_path: Path) -> None:
    going = run_folder(tmp_path / "going", [row(0)])
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "rollout/rew')
    assert read_run(going, "going").steps == [0]
    begun = run_folder(tmp_path / "begun", [])
    (begun / "metrics.jsonl").unlink()
    text = page_of(begun)
    assert "No step is finished yet" in text
    assert "0 of 4 steps, not running" in text


def test_a_folder_says_whether_its_run_goes_on(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)])
    assert not is_held(folder)
    script = (
        "import sys; from pathlib import Path; from slime_spec.folder_lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]), 'run.name'); print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert read_run(folder, "mine").status == "1 of 4 steps, running"
        process.kill()
    assert read_run(folder, "mine").status == "1 of 4 steps, not running", "its file stays, as after kill -9"
    FolderLock(folder, "run.name").close()


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/x"), Path("/b/x"), Path("/b/y/metrics.jsonl")]) == ["a/x", "b/x", "b/y"]
    assert distinct_names([Path("/a/x"), Path("/a/x")]) == ["x (1)", "x (2)"]


def test_a_long_run_is_drawn_with_fewer_points_and_its_tables_stay_exact(tmp_path: Path) -> None:
    num_steps = MOST_VALUES // 15
    text = page_of(run_folder(tmp_path / "long", [row(step) for step in range(num_steps)], FROZEN))
    data = data_of(text)
    num_values = sum(len(line["y"]) + 2 * len(line["low"]) for each in data["charts"] for line in each["lines"])
    assert num_values <= MOST_VALUES * 1.01
    assert len(text) < 2_000_000
    assert cells(text, "rollout/reward_mean")[2] == 0.25 + (num_steps - 1) / 8


def test_a_thinned_line_has_the_means_of_its_finite_values() -> None:
    band = ((0.0, 2.0), (2.0, 4.0), (None, None), (4.0, 6.0), (None, None))
    line = Line(0, "", ((0, 1.0), (1, 3.0), (2, None), (3, 5.0), (4, None)), band=band)
    assert thinned(line, 2).points == ((0, 2.0), (2, 5.0), (4, None))
    assert thinned(line, 2).band == ((1.0, 3.0), (4.0, 6.0), (None, None))
    assert thinned(line, 1) == line


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.84375, "0.8438"),
        (538060032.0, "538,060,032"),
        (1.7e-6, "1.700e-06"),
        (12.5, "12.5"),
        (-3.0, "-3"),
    ],
)
def test_figures_have_four_digits(value: float, text: str) -> None:
    assert shown(value) == text


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be the folder of a run"):
        read_run(tmp_path, "x")
    folder = run_folder(tmp_path / "mine", [row(0), row(1)])
    (folder / "metrics.jsonl").write_text('{"step": 0}\nnot json\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2"):
        read_run(folder, "mine")


def test_settings_of_another_version_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)])
    (folder / "config.yaml").write_text("trainer: {lr: 0.5, gone: [1, 2]}\n")
    text = page_of(folder)
    assert re.search(
        r'data-setting="trainer.gone"[^>]*><th[^>]*>trainer.gone</th><td>–</td><td class="set">\[1,2\]<', text
    )
    assert re.search(r'data-setting="trainer.lr"[^>]*><th[^>]*>trainer.lr</th><td>1e-05</td><td class="set">0.5<', text)


def test_the_page_says_what_a_run_ran_with_as_far_as_that_is_known(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)])
    git = {"revision": "4f0c", "dirty": True}
    (folder / "versions.json").write_text(json.dumps({"python": "3.11.2", "packages": {"torch": "2.13"}, "git": git}))
    assert f"{folder} · Python 3.11.2 · torch 2.13 · revision 4f0c with local changes<" in page_of(folder)
    (folder / "versions.json").write_text('{"packages": 3}')
    assert f'<p class="quiet">{folder}</p>' in page_of(folder)


def test_a_page_of_measurements_alone_has_no_section_of_runs(tmp_path: Path) -> None:
    (tmp_path / "speed.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    text = html(Page((), (read_measured(tmp_path / "speed.svg"),)), NOW)
    page = Elements(text)
    (picture,) = [each["src"] or "" for tag, each in page.tags if tag == "img"]
    assert picture.startswith("data:image/svg+xml;base64,")
    assert "Measurements – slime_spec" in page.texts
    assert not [each for tag, each in page.tags if tag == "section" and "id" in each]


def test_a_section_without_values_is_left_out(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "mine", [{"step": 0, "rollout/reward_mean": 0.5}]), "mine")
    assert [title for title, _ in charts_of([run])] == ["Learning"]
    assert named(charts_of([run]), "Reward").lines == (Line(0, "", ((0, 0.5),)),)


REWARD = "rollout/reward_mean"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400, "1.7e308"])
def test_a_number_that_another_tool_wrote_beyond_what_can_be_drawn_is_not_finite(tmp_path: Path, value: str) -> None:
    folder = run_folder(tmp_path / "run", [])
    lines = [f'{{"step": {step}, "{REWARD}": {number}}}\n' for step, number in enumerate((0.5, value, value, 0.25))]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (run,) = read_runs([folder])
    assert run.points(REWARD) == [(0, 0.5), (1, None), (2, None), (3, 0.25)]
    (drawn,) = chart(page_of(folder), "Reward")["lines"]
    assert drawn["y"] == [0.5, None, None, 0.25]


def test_names_and_samples_of_another_kind_are_left_out_or_shown_as_they_are(tmp_path: Path) -> None:
    names = ["spec/accept_length_by_version/x", "spec/accept_length_by_version/²", "eval/a/pass@x", "eval/a/pass@"]
    odd = [{"prompt_id": [1], "reply": "listed"}, {"prompt_id": {"a": 1}, "reward": 10**400, "reply": "huge"}]
    folder = run_folder(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, **dict.fromkeys(names, 1.0)}) + "\n")
    (folder / "samples.jsonl").write_text("".join(json.dumps({"rollout_id": 0, **each}) + "\n" for each in odd))
    texts = Elements(page_of(folder)).texts
    assert set(names) <= {text.strip() for text in texts}
    ((listed, huge),) = ends_of_samples(folder / "samples.jsonl")
    assert (listed.reply, huge.reply, huge.reward) == ("listed", "huge", None)
