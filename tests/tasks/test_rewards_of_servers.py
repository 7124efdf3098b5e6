"""The reward remote_rm asks a server, and coroutines wait side by side: against a real server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from data_files import jsonl, row

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.checks import check
from slime_spec.config.schema import by_flag
from slime_spec.config.tree import Config, TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.tasks import remote
from slime_spec.tasks.judge import Reply, RewardName, Verdict
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample, Prompt

PROMPT = Prompt(3, "data", "2+3?", (1, 2), "5", label=5, rendered="u:2+3?;a:")
Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


class Server(ThreadingHTTPServer):
    """Answers each POST by ``answer``, and notes what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = lambda asked: (200, b"1.0")
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/rm"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        status, body = self.server.answer(asked)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def verdicts(url: str, *texts: str, limit_s: float = 60.0, key: str | None = None) -> list[Verdict]:
    args = by_flag(Config(task=TaskConfig(rm_url=url, reward_timeout_s=limit_s)))
    judge = RewardName("remote_rm", key=key, args=args, limit_s=limit_s).load()
    replies = [
        Reply(PROMPT, GeneratedSample("3", index, (7,), (-0.5,), "stop", 4, 2), text)
        for index, text in enumerate(texts)
    ]
    return judge.verdicts(replies)


def test_the_server_gets_slimes_fields_and_its_number_or_object_is_the_reward(server: Server) -> None:
    server.answer = lambda asked: (200, json.dumps({"score": len(asked["response"]), "acc": 0.5}).encode())
    assert [verdict.reward for verdict in verdicts(server.url, "a", "abc")] == [1.0, 3.0]
    assert sorted(server.asked, key=lambda each: each["response"]) == [
        {"prompt": "u:2+3?;a:", "response": "a", "label": 5},
        {"prompt": "u:2+3?;a:", "response": "abc", "label": 5},
    ]
    assert verdicts(server.url, "a", key="acc")[0].reward == 0.5
    server.answer = lambda asked: (200, b"0.25")
    assert verdicts(server.url, "a")[0].reward == 0.25


def test_the_replies_of_a_group_are_asked_side_by_side(server: Server) -> None:
    """The server answers none of them before all have arrived."""
    all_here = threading.Barrier(8, timeout=60)

    def answer(asked: dict[str, Any]) -> tuple[int, bytes]:
        all_here.wait()
        return 200, asked["response"].encode()

    server.answer = answer
    assert [verdict.reward for verdict in verdicts(server.url, *map(str, range(8)))] == [*map(float, range(8))]


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server: Server) -> None:
    server.answer = lambda asked: (200, b"1.0") if len(server.asked) > 2 else (503, b"starting")
    assert verdicts(server.url, "a")[0].reward == 1.0
    assert len(server.asked) == 3
    server.asked.clear()
    server.answer = lambda asked: (422, b"no such field")
    (verdict,) = verdicts(server.url, "a")
    assert (verdict.reward, len(server.asked)) == (None, 1)
    assert f"RemoteRewardError: {server.url} answered 422 Unprocessable" in verdict.error
    assert "no such field" in verdict.error.partition("\n")[0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>", "answered no JSON: <html>"),
        (b'"1"', "must be a finite number, it was '1'"),
        (b"NaN", "must be a finite number"),
        (b'{"a": 1}', "must have the key 'score'"),
    ],
)
def test_an_answer_that_is_no_reward_excludes_the_sample_and_says_why(server: Server, body: bytes, reason: str) -> None:
    server.answer = lambda asked: (200, body)
    (verdict,) = verdicts(server.url, "a")
    assert verdict.reward is None
    assert reason in verdict.error


def test_an_answer_that_never_ends_is_not_read_to_its_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LONGEST_ANSWER_BYTES", 1 << 20)
    server.answer = lambda asked: (200, b"1" * (64 << 20))
    (verdict,) = verdicts(server.url, "5")
    assert verdict.reward is None
    assert "answered more than 1 MiB" in verdict.error


def test_a_server_that_is_not_there_costs_the_sample_after_the_time_limit() -> None:
    with Server() as gone:
        url = gone.url
    (verdict,) = verdicts(url, "a", limit_s=0.5)
    assert verdict.reward is None
    assert f"no reward of {url} within 0.45 s: ClientConnectorError" in verdict.error


def test_a_server_that_hangs_costs_the_sample_after_the_time_limit(server: Server) -> None:
    goes_on = threading.Event()
    server.answer = lambda asked: (200, b"1.0") if goes_on.wait(60) else (500, b"")
    (verdict,) = verdicts(server.url, "a", limit_s=0.5)
    goes_on.set()
    assert verdict.reward is None
    assert "within 0.45 s: " in verdict.error


def test_a_run_needs_the_servers_address_and_no_other_reward_takes_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", row("a", 1)).prompt_data
    with pytest.raises(ConfigError, match=r"task\.rm_url: must be given for the reward remote_rm"):
        PromptSource(Config(task=TaskConfig(prompt_data=data, reward="remote_rm")), tokenizer)
    with pytest.raises(ConfigError, match=r"is asked by the reward remote_rm, and this run's is exact"):
        PromptSource(Config(task=TaskConfig(prompt_data=data, reward="exact", rm_url="http://a")), tokenizer)
    with pytest.raises(ConfigError, match="must be an http address"):
        check(Config(task=TaskConfig(prompt_data=data, reward="remote_rm", rm_url="localhost:8000")))


def test_a_run_scores_by_the_server(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    server.answer = lambda asked: (200, str(len(asked["response"])).encode())
    data = jsonl(tmp_path / "data.jsonl", '{"prompt": "2+3?"}').prompt_data
    task = TaskConfig(prompt_data=data, reward="remote_rm", rm_url=server.url, reward_processes=1)
    with closing(PromptSource(Config(task=task), tokenizer)) as source:
        (prompt,) = source.take(1, 0)
        ids = tokenizer.encode("five")
        (sample,) = source.score(prompt, [GeneratedSample("0", 0, ids, (0.0,) * 4, "stop", 0, 1)])()
    assert sample.reward == 4.0
    assert server.asked[0] == {"prompt": "u:2+3?;a:", "response": "", "label": ""}, "the reward was tried first"
