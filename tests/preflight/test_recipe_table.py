"""docs/launch.md says of every recipe what its dry run plans."""

from __future__ import annotations

from tests.support.recipe_table import BEGIN, DOC, END, table


def test_the_table_of_recipes_is_what_the_dry_runs_plan() -> None:
    document = DOC.read_text(encoding="utf-8")
    written = document.partition(BEGIN)[2].partition(END)[0]
    assert written == table(), "python -m tests.support.recipe_table writes it again"
