"""Two ``slime-spec serve`` processes behind the real sglang-router, and the clients that come with SGLang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from slime_spec.ports import free_port
from tests.support.sglang_real import cpu_environment, sglang_python

# Two processes, a router and a client start: half a minute on two cores.
pytestmark = [
    pytest.mark.sglang_server,
    pytest.mark.proves(
        "rollout.embedded.http", "rollout.embedded.drafters", "slime_spec.launch.serve", "tests.support.sglang_clients"
    ),
]
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120.0
# As slime 624b824a8 sends it; the router spells every field that it knows and that is absent as null.
SLIMES_PARAMETERS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "max_new_tokens": 24,
    "stop": None,
    "stop_token_ids": None,
    "skip_special_tokens": False,
    "no_stop_trim": True,
    "spaces_between_special_tokens": False,
}


@dataclass(frozen=True)
class Fleet:
    """A router, the servers behind it in the order in which they came, and the folder of their logs."""

    router: str
    servers: tuple[str, ...]
    policy: Path
    logs: Path

    def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        response = requests.post(f"{self.router}{path}", json=body, headers=headers, timeout=TIMEOUT_S)
        assert response.status_code == 200, response.text
        return response.json()

    def generate(self, **body: Any) -> Any:
        return self.post("/generate", body)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def started(stack: ExitStack, command: list[str], log: Path) -> subprocess.Popen[str]:
    """Start a process that ends with the stack, in order."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stack.enter_context(log.open("w")), text=True, env={**os.environ}
    )

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)

    stack.callback(end)
    return process


@pytest.fixture(scope="module")
def fleet(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    python = sglang_python()
    found = subprocess.run([python, "-c", "import sglang_router"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"needs sglang-router in the environment of {python}")
    logs, port = tmp_path_factory.mktemp("fleet"), free_port("127.0.0.1")
    serve = [sys.executable, "-m", "slime_spec", "serve", "--hf-checkpoint", str(policy), "--port", "0"]
    serve += ["--sp-type", "deterministic", "--rollout-num-cpus-per-engine", "1"]
    route = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    route += ["--prometheus-port", str(free_port("127.0.0.1")), "--policy", "round_robin", "--log-level", "warn"]
    route += ["--shutdown-grace-period-secs", "1"]
    with ExitStack() as stack:
        processes = [started(stack, serve, logs / f"serve-{index}.log") for index in range(2)]
        with cpu_environment():
            started(stack, route, logs / "router.log")
        lines = [process.stdout.readline() for process in processes if process.stdout is not None]
        servers = tuple(line.split()[1] for line in lines)
        router = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{router}/liveness"), "the router does not start")
        for server in servers:  # as slime enters its engines
            entered = {"url": server, "worker_type": "regular"}
            requests.post(f"{router}/workers", json=entered, timeout=TIMEOUT_S).raise_for_status()
        wait_until(lambda: healthy_workers(router) == sorted(servers), "the router does not take the servers")
        yield Fleet(router, servers, policy, logs)


def healthy_workers(router: str) -> list[str]:
    workers = requests.get(f"{router}/workers", timeout=TIMEOUT_S).json()["workers"]
    return sorted(worker["url"] for worker in workers if worker["is_healthy"])


def num_answered(server: str) -> int:
    state = requests.get(f"{server}/server_info", timeout=TIMEOUT_S).json()["internal_states"][0]
    return int(state["num_answered_samples"])


def test_a_router_sends_slimes_requests_to_both_and_each_is_answered(fleet: Fleet) -> None:
    before = [num_answered(server) for server in fleet.servers]
    params = {**SLIMES_PARAMETERS, "sampling_seed": 7}
    body = {"input_ids": list(b"abcabcabc"), "sampling_params": params, "return_logprob": True}
    first, second = (fleet.post("/generate", body, **{"X-SMG-Routing-Key": "a"}) for _ in range(2))
    assert [num_answered(server) - each for server, each in zip(fleet.servers, before, strict=True)] == [1, 1]
    assert first["output_ids"] == second["output_ids"]
    for answer in (first, second):
        info = answer["meta_info"]
        assert [token_id for _, token_id, _ in info["output_token_logprobs"]] == answer["output_ids"]
        assert info["finish_reason"]["type"] in ("stop", "length")
        assert info["weight_version"] == "default"
    batch = fleet.generate(input_ids=[[97, 98], [99]], sampling_params={"max_new_tokens": 3, "n": 2})
    assert len(batch) == 4


def test_the_router_drops_what_slime_asks_of_top_p_and_a_server_does_not(fleet: Fleet) -> None:
    """slime's own build of the router passes it; docs/http.md says what to do with this one."""
    params = {**SLIMES_PARAMETERS, "top_p": 0.9, "custom_params": {"return_top_p_token_ids": True}}
    body = {"input_ids": [97, 98], "sampling_params": params, "return_logprob": True}
    assert "top_p_token_ids" not in fleet.generate(**body)["meta_info"]
    answer = requests.post(f"{fleet.servers[0]}/generate", json=body, timeout=TIMEOUT_S).json()
    assert len(b64decode(answer["meta_info"]["top_p_token_offsets"])) == 4 * (len(answer["output_ids"]) + 1)


def test_slimes_abort_ends_when_every_server_is_idle(fleet: Fleet) -> None:
    """As slime aborts: of each worker of the router all, again until its load says that nothing is left."""
    params = {**SLIMES_PARAMETERS, "max_new_tokens": 30_000, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(fleet.generate, input_ids=[97, 98], sampling_params=params, return_logprob=True)
            for _ in range(4)
        ]

        def num_requests(server: str) -> int:
            load = requests.get(f"{server}/v1/loads?include=core", timeout=TIMEOUT_S).json()
            assert load["aggregate"]["total_reqs"] == sum(each["num_total_reqs"] for each in load["loads"])
            older = requests.get(f"{server}/get_load", timeout=TIMEOUT_S).json()
            assert [set(each) >= {"dp_rank", "num_reqs", "num_waiting_reqs"} for each in older] == [True]
            return int(load["aggregate"]["total_reqs"])

        wait_until(lambda: sum(map(num_requests, fleet.servers)) == 4, "not all requests came")
        for server in healthy_workers(fleet.router):
            requests.post(f"{server}/abort_request", json={"abort_all": True}, timeout=TIMEOUT_S).raise_for_status()
        wait_until(lambda: sum(map(num_requests, fleet.servers)) == 0, "requests are left")
        aborted = [each.result(TIMEOUT_S)["meta_info"] for each in running]
    assert {info["finish_reason"]["type"] for info in aborted} == {"abort"}
    assert all(len(info["output_token_logprobs"]) == info["completion_tokens"] for info in aborted)


def test_openais_client_talks_through_the_router(fleet: Fleet) -> None:
    client = openai.OpenAI(base_url=f"{fleet.router}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [str(fleet.policy)]
    made = client.completions.create(model="any", prompt="abcabc", max_tokens=8, temperature=0, logprobs=2)
    assert made.usage is not None
    assert made.usage.completion_tokens == 8
    message: Any = {"role": "user", "content": "abc"}
    whole = client.chat.completions.create(model="any", messages=[message], max_tokens=8, temperature=0)
    stream = client.chat.completions.create(model="any", messages=[message], max_tokens=8, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content


def test_what_the_router_asks_to_stop_waiting_for_is_aborted(fleet: Fleet) -> None:
    body = {"text": "abc", "stream": True, "sampling_params": {"max_new_tokens": 30_000, "ignore_eos": True}}
    with requests.post(f"{fleet.router}/generate", json=body, stream=True, timeout=TIMEOUT_S) as response:
        assert next(response.iter_lines()).startswith(b"data: ")
    for server in fleet.servers:
        wait_until(
            lambda server=server: not requests.get(f"{server}/get_load", timeout=TIMEOUT_S).json()[0]["num_reqs"],
            "a reply goes on that nobody reads",
        )


def test_sglangs_frontend_language_and_benchmark_run(fleet: Fleet, tmp_path: Path) -> None:
    script = ROOT / "tests" / "support" / "sglang_clients.py"
    server = fleet.servers[0]
    with cpu_environment():
        done = subprocess.run(
            [sglang_python(), str(script), server, str(fleet.policy), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    frontend = found["frontend"]
    assert (frontend["model"], frontend["algorithm"]) == (str(fleet.policy), "LOOKUP")
    greedy = {"max_new_tokens": 12, "temperature": 0, "skip_special_tokens": True}
    for text, answer in zip(frontend["texts"], frontend["answers"], strict=True):
        prompt = text[: text.rindex("ASSISTANT:") + len("ASSISTANT:")]
        plain = requests.post(f"{server}/generate", json={"text": prompt, "sampling_params": greedy}, timeout=TIMEOUT_S)
        assert plain.json()["text"] == answer
    assert frontend["num_logprobs"] == 12
    assert frontend["streamed"] == frontend["answers"][0]
    assert frontend["choice"] == likeliest(server, "the cat sat on the ", ["mat", "dog", "cat and the"])
    assert (found["benchmark"]["completed"], found["benchmark"]["total_output_tokens"]) == (3, 24)


def likeliest(server: str, prompt: str, choices: list[str]) -> str:
    """The choice of the greatest mean logprob, as one token healed by SGLang's client counts, computed from our own."""
    scores = {}
    for choice in choices:
        body = {"text": prompt + choice, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
        body["logprob_start_len"] = len(prompt) - 1  # tokens are bytes: the last of the prompt has no logprob
        answer = requests.post(f"{server}/generate", json=body, timeout=TIMEOUT_S).json()
        values = [logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]]
        scores[choice] = sum(values) / len(values)
    return max(scores, key=lambda choice: scores[choice])


def test_no_server_logged_a_traceback(fleet: Fleet) -> None:
    for index in range(2):
        assert "Traceback" not in (fleet.logs / f"serve-{index}.log").read_text()
