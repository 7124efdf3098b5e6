"""What scripts write into the documentation is what they would write now."""

import importlib.util
from pathlib import Path

from slime_spec.launch.doctor import USAGE
from slime_spec.preflight.document import markdown

ROOT = Path(__file__).resolve().parents[2]


def test_the_readmes_tree_has_every_file_with_its_own_first_line():
    location = importlib.util.spec_from_file_location("make_readme_tree", ROOT / "scripts" / "make_readme_tree.py")
    assert location is not None
    assert location.loader is not None
    script = importlib.util.module_from_spec(location)
    location.loader.exec_module(script)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.with_tree(readme) == readme, "run: python scripts/make_readme_tree.py"
    assert "cli.py" in readme


def test_the_document_of_the_doctor_has_every_check_with_its_reason():
    document = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert document == markdown(USAGE), "run: python scripts/make_doctor_doc.py"
    assert "**flashinfer-graph-padding**" in document
