"""The server describes itself truly: every route, its fields, its load; and it logs requests without their secrets."""

import logging
import re
import socket
from html.parser import HTMLParser

import pytest
import requests
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families

from rollout.embedded.http.calls import KNOWN, LOGPROBS, SERVED, SHOWN
from rollout.embedded.http.described import GENERATE, SAMPLING
from rollout.embedded.http.generations import Throughput
from rollout.embedded.http.sampling import KNOWN as PARAMETERS
from rollout.embedded.http.sampling import UNSERVED_PARAMETERS
from slime_spec.config.tree import Config
from tests.support.http_server import TIMEOUT_S, Served, served

PARAMS = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}


def test_the_description_has_every_route_and_schemas_that_are_schemas(server: Served) -> None:
    status, description = server.get("/openapi.json")
    assert status == 200
    assert description["openapi"].startswith("3.1")
    paths = description["paths"]
    assert paths["/v1/chat/completions"]["post"]["summary"] == (
        "Write the next turn of a chat, in OpenAI's form of chat completions."
    )
    assert set(paths["/generate"]) == {"post", "put"}
    operations = [operation for path in paths.values() for operation in path.values()]
    assert all(operation["summary"].endswith(".") for operation in operations)
    bodies = [
        each["requestBody"]["content"]["application/json"]["schema"] for each in operations if "requestBody" in each
    ]
    for schema in bodies:
        Draft202012Validator.check_schema(schema)
    completion = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert completion["required"] == ["prompt"]
    names = set(re.findall(r"#/components/schemas/(\w+)", str(paths)))
    assert names == set(description["components"]["schemas"]) == {"StreamOptions", "Prediction"}


def test_a_body_that_fits_its_description_is_served_and_one_that_does_not_is_refused(server: Served) -> None:
    """The fields of the description are those that are read: none of them is unknown to its endpoint."""
    _, description = server.get("/openapi.json")
    for path, operations in description["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is None or path.startswith("/v1/"):
            continue
        status, answer = server.post(path, {"no_such_field": 1})
        assert status == 400
        assert "is not a field of this request" in answer["error"]["message"]
        for name in body["content"]["application/json"]["schema"]["properties"]:
            assert name in answer["error"]["message"], (path, name)


def test_the_fields_of_generate_are_described() -> None:
    assert {*SERVED, *LOGPROBS, *SHOWN} <= set(GENERATE) <= KNOWN
    spaces = {"spaces_between_special_tokens"}  # taken, and without effect
    assert set(SAMPLING) == PARAMETERS - set(UNSERVED_PARAMETERS) - spaces


class Page(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name == "src" or (tag == "link" and name == "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_for_people_needs_no_network_and_shows_every_route(server: Served) -> None:
    response = requests.get(f"{server.url}/docs", timeout=TIMEOUT_S)
    assert response.headers["Content-Type"].startswith("text/html")
    page = Page()
    page.feed(response.text)
    assert page.loaded == []
    _, description = server.get("/openapi.json")
    for path, operations in description["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in page.text
    assert "include_usage" not in page.text  # of a part, which openapi.json has
    assert "max_completion_tokens" in page.text


def test_metrics_have_sglangs_names_and_add_up(config: Config) -> None:
    with served(config) as fresh:
        answers = [fresh.generate(text=text, sampling_params=PARAMS)["meta_info"] for text in ("abcabcabc", "xyz")]
        response = requests.get(f"{fresh.url}/metrics", timeout=TIMEOUT_S)
        assert response.headers["Content-Type"].startswith("text/plain")
        found = {
            sample.name: sample
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
            if "le" not in sample.labels
        }
        loads = fresh.get("/v1/loads")[1]["loads"]
    assert {sample.labels["model_name"] for sample in found.values()} == {config.model.hf_checkpoint}
    values = {name.removeprefix("sglang:"): sample.value for name, sample in found.items()}
    rounds = sum(info["spec_verify_ct"] for info in answers)
    correct = sum(info["spec_num_correct_drafts"] for info in answers)
    assert values["generation_tokens_total"] == 80
    assert values["prompt_tokens_total"] == sum(info["prompt_tokens"] for info in answers)
    assert values["num_requests_total"] == values["e2e_request_latency_seconds_count"] == 2
    assert values["time_to_first_token_seconds_count"] == 2
    assert values["e2e_request_latency_seconds_sum"] == pytest.approx(sum(info["e2e_latency"] for info in answers))
    assert values["spec_verify_calls_total"] == rounds
    assert values["spec_accept_length"] == pytest.approx(1 + correct / rounds)
    assert values["spec_accept_rate"] == pytest.approx(
        correct / sum(info["spec_num_proposed_drafts"] for info in answers)
    )
    assert (values["num_running_reqs"], values["num_queue_reqs"], values["token_usage"]) == (0, 0, 0)
    assert values["gen_throughput"] > 0
    (load,) = loads
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_total_reqs"]) == (0, 0, 0)
    assert load["max_total_num_tokens"] == values["max_total_num_tokens"]
    assert load["speculative"]["accept_length"] == values["spec_accept_length"]


def test_throughput_is_of_the_last_ten_seconds() -> None:
    now = [100.0]
    throughput = Throughput(lambda: now[0])
    throughput.add(30)
    assert throughput.per_second() == 30
    now[0] = 104.0
    throughput.add(10)
    assert throughput.per_second() == 10
    now[0] = 110.0
    assert throughput.per_second() == 1
    now[0] = 130.0
    assert throughput.per_second() == 0


def test_scrapers_and_probes_need_no_key_and_the_description_does(config: Config) -> None:
    with served(config, api_key="secret") as locked:
        statuses = {path: requests.get(locked.url + path, timeout=TIMEOUT_S).status_code for path in OPEN_OR_NOT}
        assert locked.get("/openapi.json")[1]["security"] == [{"key": []}]
    assert statuses == OPEN_OR_NOT


OPEN_OR_NOT = {"/health": 200, "/metrics": 200, "/openapi.json": 401, "/docs": 401, "/v1/models": 401, "/v1/loads": 401}
LINE = re.compile(r"request method=(\S+) path=(\S+) status=(\S+) seconds=\d+\.\d{3} client=(\S+)")


def test_the_access_log_has_a_line_for_each_request_and_no_key(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with served(config, api_key="secret") as locked:
        locked.generate(text="abc", sampling_params=PARAMS)
        locked.stream(text="abc", sampling_params=PARAMS)
        locked.post("/generate", {"text": 1})
        requests.get(f"{locked.url}/v1/models?key=secret", headers={"Authorization": "Bearer secre"}, timeout=TIMEOUT_S)
        requests.get(f"{locked.url}/a%0Ab", headers=locked.headers, timeout=TIMEOUT_S)
        host, port = locked.url.removeprefix("http://").split(":")
        long = b'{"text": "abc", "stream": true, "sampling_params": {"max_new_tokens": 30000, "ignore_eos": true}}'
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as client:
            client.sendall(head % len(long) + long)
            client.recv(100)
    lines = [found.groups() for record in caplog.records if (found := LINE.fullmatch(record.getMessage()))]
    assert lines == [
        ("POST", "/generate", "200", "127.0.0.1"),
        ("POST", "/generate", "200", "127.0.0.1"),
        ("POST", "/generate", "400", "127.0.0.1"),
        ("GET", "/v1/models", "401", "127.0.0.1"),
        ("GET", "/a%0Ab", "404", "127.0.0.1"),
        ("POST", "/generate", "closed", "127.0.0.1"),
    ]
    assert "secre" not in caplog.text


def test_the_access_log_can_be_switched_off(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with served(config, access_log=False) as quiet:
        assert quiet.get("/health")[0] == 200
    assert not [record for record in caplog.records if LINE.fullmatch(record.getMessage())]
