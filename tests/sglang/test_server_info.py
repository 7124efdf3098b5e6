"""What a server reports of itself is believed where it has the form that it must have."""

from __future__ import annotations

import socket
from threading import Thread

import pytest

from slime_spec.sglang.server_info import Load, ServerInfo, ask_server, load_of


@pytest.mark.parametrize("answer", [None, [], {"loads": 3}, {"loads": [3]}, {"loads": [{"num_running_reqs": "many"}]}])
def test_a_load_that_is_no_number_counts_as_none(answer: object) -> None:
    assert load_of(answer) == Load(0, 0, 0)


def test_what_a_server_reports_of_itself_counts_where_it_is_a_number() -> None:
    info = ServerInfo.of({"version": "1", "max_total_num_tokens": "many", "tp_size": None, "dp_size": 2})
    assert (info.max_total_tokens, info.num_ranks, info.num_steps) == (0, 2, 0)


def test_a_flag_that_a_server_reports_in_another_type_counts_as_not_reported() -> None:
    told = {
        "page_size": "x",
        "mem_fraction_static": 1,
        "cuda_graph_bs_decode": [1, "2"],
        "dtype": None,
        "tp_size": True,
    }
    assert dict(ServerInfo.of({"version": "1", **told}).flags) == {"mem_fraction_static": 1, "dtype": None}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n{",
        b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100_000,
    ],
)
def test_what_answers_no_server_info_is_no_server(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(answer)

        thread = Thread(target=serve)
        thread.start()
        assert ask_server(f"127.0.0.1:{listening.getsockname()[1]}", None) is None
        thread.join()
