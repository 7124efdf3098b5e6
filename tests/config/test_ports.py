"""Ports that are free now, and are likely still free when a server binds them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from slime_spec import ports
from slime_spec.errors import ConfigError
from slime_spec.ports import PORTS_FROM, check_port, free_port


def test_a_port_in_use_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"must be free on 127\.0\.0\.1"):
            check_port("127.0.0.1", taken.getsockname()[1])
    check_port("127.0.0.1", free_port("127.0.0.1"))
    check_port("::1", free_port("::1"))


def test_a_chosen_port_is_none_that_a_connection_gets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first_ephemeral = 32768  # Linux's default; the machine that runs this test may have another
    (tmp_path / "range").write_text(f"{first_ephemeral}\t60999\n")
    monkeypatch.setattr(ports, "EPHEMERAL_PORTS", tmp_path / "range")
    chosen = {free_port("127.0.0.1", 16) for _ in range(50)}
    assert len(chosen) > 40, "two processes must not choose alike"
    assert all(PORTS_FROM <= port < first_ephemeral for port in chosen)


def test_all_ports_in_the_row_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        choose, places = ports._any_port, iter([port - 2, port - 1, port])
        monkeypatch.setattr(ports, "_any_port", lambda host: next(places, None) or choose(host))
        first = free_port("127.0.0.1", 3)
        assert next(places, None) is None, "each row that holds the taken port was passed over"
        assert port not in range(first, first + 3)


def test_where_the_system_leaves_no_choice_the_system_chooses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = tmp_path / "range"
    monkeypatch.setattr(ports, "EPHEMERAL_PORTS", settings)
    monkeypatch.setattr(ports, "_port_of_the_system", lambda host: 61)
    for written in ("1024\t65535\n", "20500\t60000\n"):
        settings.write_text(written)
        assert ports._any_port("127.0.0.1") == 61
    settings.unlink()
    assert ports._any_port("127.0.0.1") == 61


def test_an_address_of_another_machine_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="must be an address of the node"):
        free_port("192.0.2.1")
