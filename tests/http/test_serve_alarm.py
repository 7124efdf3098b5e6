"""A served draft that is never right is told of in the server's log, as a run's is."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded.http.generations import Generations
from rollout.embedded.http.server import EngineServer, ServerOptions
from rollout.embedded.http.serving import OneThread
from slime_spec.metrics.alarm import SILENT_ROUNDS
from slime_spec.types import GeneratedSample, SpecCounters
from tests.support.embedded_harness import engine_config

ANSWERED = GeneratedSample("rid", 0, (5,), (-1.0,), "stop", 0, 2)


def warnings_of(folder: Path, algorithm: str, spec: SpecCounters, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a server of ``algorithm`` logs about two answers with these counters each."""
    server = EngineServer(engine_config(folder, algorithm), ServerOptions(port=0))
    serving = server._serving(Generations(server._engine, 99), OneThread("control"), OneThread("reading"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            serving.totals.count(replace(ANSWERED, spec=spec))
    server._socket.close()
    return [record.getMessage() for record in caplog.records if "accept length" in record.getMessage()]


def test_answers_without_an_accepted_draft_are_told_of_once_they_are_many(
    policy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = SpecCounters(num_rounds=SILENT_ROUNDS, num_proposed=800, histogram=(SILENT_ROUNDS,), num_empty_rounds=50)
    (warning,) = warnings_of(policy, "LOOKUP", silent, caplog)
    assert "rounds=300 samples=2 algorithm=LOOKUP" in warning


@pytest.mark.parametrize(
    ("algorithm", "spec"),
    [
        ("LOOKUP", SpecCounters(num_rounds=SILENT_ROUNDS, num_proposed=800, histogram=(SILENT_ROUNDS - 1, 1))),
        ("LOOKUP", SpecCounters()),
        ("NONE", SpecCounters()),
    ],
)
def test_accepted_drafts_and_plain_decoding_are_no_alarm(
    policy: Path, caplog: pytest.LogCaptureFixture, algorithm: str, spec: SpecCounters
) -> None:
    assert warnings_of(policy, algorithm, spec, caplog) == []
