"""What a real SGLang server answers, for rollout/sglang_engine/recordings.json, which the fake server replays.

    python -m tests.support.sglang_recording           # records the SGLang that scripts/install-sglang-cpu.sh installs
    python -m tests.support.sglang_recording 0.5.20    # and another release, of which there are no refusals

Versions too old to run here are not recorded: theirs is the recorded response under the keys of their source.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.sglang_engine.contract import END, TENSOR, request_fields
from rollout.sglang_engine.delivery import BEGIN
from rollout.sglang_engine.recordings import RECORDINGS
from tests.support.sglang_real import PROMPTS, Models, Real, cpu_environment, sglang_python, started

ALGORITHM = "EAGLE3"
NUM_TOKENS = 196
PROVENANCE = f"recorded from a server on the CPU ({ALGORITHM}) by tests/support/sglang_recording.py"
# What a fake response fills in, and what never repeats.
FILLED = {"id": "r1", "output_token_logprobs": [], "e2e_latency": 1.0, "response_sent_to_client_ts": 0.0}
# Older names -> the recorded ones; the other keys have kept theirs.
OLDER_KEYS = {
    "spec_accepted_drafts": "spec_num_correct_drafts",
    "spec_proposed_drafts": "spec_num_proposed_drafts",
    "spec_accept_token_num": "spec_num_correct_drafts",
    "spec_draft_token_num": "spec_num_proposed_drafts",
    "spec_accept_histogram": "spec_correct_drafts_histogram",
}


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    def http_response(self, request: Any, response: Any) -> Any:
        return response


_NO_ERRORS = urllib.request.build_opener(_AnyStatus, urllib.request.ProxyHandler({}))


SAMPLING = {"temperature": 0.0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
REQUEST = {"rid": "r1", "input_ids": list(PROMPTS[0]), "sampling_params": SAMPLING, "return_logprob": True}


def recording(real: Real) -> dict[str, Any]:
    """A finished response's metadata, and the fields of a weight update."""
    meta_info = _answer(real, "/generate", REQUEST)["meta_info"]
    meta_info |= {name: value for name, value in FILLED.items() if name in meta_info}
    openapi = _answer(real, "/openapi.json")
    return {"meta_info": meta_info, "tensor_fields": sorted(request_fields(openapi, TENSOR) or ())}


def refusals(real: Real) -> dict[str, Any]:
    """What a server of the present contract says of calls out of turn, and of a request that is too long."""
    update = {"serialized_named_tensors": [""], "selector": "target"}
    errors = {"no_session": _refusal(real, TENSOR, update), "no_begin": _refusal(real, END, {})}
    _answer(real, BEGIN, {"selector": "all"})
    errors["session_open"] = _refusal(real, BEGIN, {"selector": "all"})
    _answer(real, END, {})
    too_long = {**REQUEST, "sampling_params": {**SAMPLING, "max_new_tokens": 10**6}}
    return {**errors, "too_long": _answer(real, "/generate", too_long, status=400)}


def _answer(real: Real, path: str, body: Mapping[str, Any] | None = None, status: int = 200) -> Any:
    """The JSON as it comes, past the engine's own reading of it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(real.engine.client.url + path, data, {"Content-Type": "application/json"})
    with _NO_ERRORS.open(request, timeout=120) as response:
        text = response.read().decode()
    assert response.status == status, f"{path}: {response.status} {text}"
    return json.loads(text)


def _refusal(real: Real, path: str, body: Mapping[str, Any]) -> str:
    answer = _answer(real, path, body, status=400)
    assert set(answer) == {"success", "message"}, answer
    assert answer["success"] is False
    return str(answer["message"])


def renewed(
    data: Mapping[str, Any], version: str, made: Mapping[str, Any], errors: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The recordings with what this version answered, and with the keys of versions that cannot run filled from it.

    ``errors`` is None for a version whose refusals are not the present ones.
    """
    provenance = {**data["provenance"], version: PROVENANCE}
    meta_info = {**data["meta_info"], version: made["meta_info"]}
    for older, keys in meta_info.items():
        if errors is not None and provenance.get(older, "") != PROVENANCE:
            meta_info[older] = {key: made["meta_info"][OLDER_KEYS.get(key, key)] for key in keys}
            provenance[older] = f"not recorded: the response of {version} under the keys of this version's source"
    return {
        "provenance": provenance,
        "meta_info": meta_info,
        "tensor_fields": {**data["tensor_fields"], version: made["tensor_fields"]},
        "errors": data["errors"] if errors is None else errors,
    }


def main(release: str = "") -> None:
    data = json.loads(RECORDINGS.read_text())
    with tempfile.TemporaryDirectory() as name, cpu_environment():
        folder = Path(name)
        config = Models.make(folder / "models").config(ALGORITHM, folder / "run", python=sglang_python(release))
        with started(config) as engine:
            real = Real(ALGORITHM, engine)
            data = renewed(data, engine.server.info.version, recording(real), None if release else refusals(real))
    RECORDINGS.write_text(json.dumps(data, indent=1) + "\n")
    sys.stdout.write(f"{RECORDINGS}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
