"""A launch that waits says for what, ends within its limit, and keeps its Ray where this machine can reach it."""

import logging
import os
import signal
import time

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch import ray_environment
from slime_spec.launch.ray_environment import PRESTART, answers, own_address, prepare_ray_environment
from slime_spec.launch.waiting import limited, told

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
NOBODYS = "192.0.2.77"  # of a range for examples, which no machine has


def test_a_long_wait_is_told_while_it_lasts(caplog):
    with caplog.at_level(logging.INFO), told("the engines", "engines ready", "the logs", every_s=0.02):
        time.sleep(0.2)
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("still waiting for the engines seconds=")
    assert first.endswith("look in the logs")
    assert last.startswith("engines ready seconds=")


def test_a_wait_that_fails_is_not_told_as_done(caplog):
    with caplog.at_level(logging.INFO), pytest.raises(OSError, match="gone"), told("Ray", "Ray started", "the logs"):
        raise OSError("gone")
    assert not caplog.records


def test_a_block_that_waits_for_ever_ends_at_its_limit():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="no end in"), limited(0.1):
        time.sleep(60)
    with limited(60.0):
        pass
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_ctrl_c_within_a_limit_stays_ctrl_c():
    with pytest.raises(KeyboardInterrupt), limited(60.0):
        signal.raise_signal(signal.SIGINT)


def test_a_machine_answers_at_its_own_addresses_alone():
    assert answers("127.0.0.1")
    assert not answers(NOBODYS)
    address = own_address()
    assert address is None or answers(address)


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.parametrize(
    ("address", "joining", "loopback"),
    [(None, False, "0"), (NOBODYS, False, "0"), ("127.0.0.1", False, None), (None, True, None)],
)
def test_a_private_ray_stays_on_the_loopback_address_where_the_machine_has_no_other(
    environment, monkeypatch, address, joining, loopback
):
    monkeypatch.setattr(ray_environment, "own_address", lambda: address)
    prepare_ray_environment(joining)
    assert os.environ.get(LOOPBACK_ONLY) == loopback
    assert os.environ.get(PRESTART) == (None if joining else "0")


def test_a_machine_without_a_loopback_address_is_told_how_to_have_one(environment, monkeypatch):
    monkeypatch.setattr(ray_environment, "own_address", lambda: None)
    monkeypatch.setattr(ray_environment, "LOOPBACK", NOBODYS)
    with pytest.raises(ConfigError, match="ip link set lo up"):
        prepare_ray_environment(joining=False)
