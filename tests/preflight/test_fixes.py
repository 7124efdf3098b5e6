"""What a finding tells its reader to do is true: the flags exist, and with them the finding is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch.draft.convert_options import _parser
from slime_spec.launch.flags import find_flag, flags
from slime_spec.preflight.finding import Severity
from slime_spec.preflight.gate import examine
from slime_spec.preflight.report import flags_to_add
from tests.support.doctor_cases import CASES
from tests.support.doctor_facts import Case, make_facts

SEEN = tuple(each for each in CASES if each.sees)
MENDABLE = tuple(each for each in SEEN if each.sees is not Severity.INFO)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
CONVERTS = set(FLAG.findall(_parser().format_help()))


def named(each: Case) -> str:
    return f"{each.trap}-{each.sees}"


def is_flag(flag: str) -> bool:
    """Also one of SGLang's own, of which findings tell; here they have a prefix."""
    try:
        find_flag(flag if flag in flags() or flag.startswith("--no-") else f"--sglang-{flag[2:]}")
    except ConfigError:
        return False
    return True


def test_a_flag_that_nobody_has_is_told_from_one() -> None:
    assert is_flag("--attention-backend")
    assert not is_flag("--attention-backing")


@pytest.mark.parametrize("each", SEEN, ids=named)
def test_every_flag_that_a_finding_names_is_one_of_the_command_line(each: Case, tmp_path: Path) -> None:
    (found,) = (one for one in examine([make_facts(tmp_path, each.argv, **each.facts)]) if one.id == each.trap)
    told = f"{found.read} {found.why} {found.remedy} {' '.join(found.fix)}"
    convert = re.search(r"slime-spec draft convert[^.]*", told)
    if convert is not None:  # a command with flags of its own, which its own reader knows
        told = told.replace(convert[0], "")
        assert set(FLAG.findall(convert[0])) <= CONVERTS
    given = {word for text in each.argv for word in FLAG.findall(text)}
    unknown = {flag for flag in set(FLAG.findall(told)) - given if not is_flag(flag)}
    assert unknown == set()


@pytest.mark.parametrize("each", MENDABLE, ids=named)
def test_the_flags_that_fix_prints_take_away_every_finding_that_has_some(each: Case, tmp_path: Path) -> None:
    before = examine([make_facts(tmp_path, each.argv, **each.facts)])
    mended = {one.id for one in before if one.fix and one.severity is not Severity.INFO}
    argv = (*each.argv, *flags_to_add(before))
    after = examine([make_facts(tmp_path, argv, **each.facts)])
    left = {one.id: f"{one.read}: {one.fix}" for one in after if one.severity is not Severity.INFO}
    assert not mended & set(left), f"{flags_to_add(before)} leaves {left}"
    assert set(left) <= {one.id for one in before}, f"{flags_to_add(before)} brings {left}"


def test_most_traps_have_flags_that_mend_them() -> None:
    """So that the two properties above speak of something."""
    assert len({each.trap for each in MENDABLE}) > 30
