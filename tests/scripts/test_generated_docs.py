"""What scripts write into the documentation is what they would write now, and what it names exists."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from slime_spec.launch.doctor import USAGE
from slime_spec.metrics.table import markdown as metrics_document
from slime_spec.preflight.document import markdown

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    location = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules[name] = module  # dataclasses look their module up
    location.loader.exec_module(module)
    return module


def test_the_tree_has_every_file_with_its_own_first_line():
    document = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert script("make_architecture_doc").with_tree(document) == document, (
        "run: python scripts/make_architecture_doc.py"
    )
    assert "cli.py" in document


def test_the_walks_name_functions_that_exist():
    document = (DOCS / "architecture.md").read_text(encoding="utf-8")
    stops = re.findall(r"([\w/]+\.py): ([\w.]+)", document)
    assert len(stops) > 30
    absent = [f"{path}: {name}" for path, name in stops if name not in defined_in(ROOT / path)]
    assert not absent


def defined_in(path: Path) -> set[str]:
    """Functions and classes of a file, and each class's functions as Class.function."""
    names: set[str] = set()
    if path.is_file():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return names


def test_the_document_of_the_doctor_has_every_check_with_its_reason():
    document = (DOCS / "doctor.md").read_text(encoding="utf-8")
    assert document == markdown(USAGE), "run: python scripts/make_doctor_doc.py"
    assert "**flashinfer-graph-padding**" in document


def test_the_document_of_metrics_has_every_name():
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == metrics_document(), "run scripts/make_metrics_doc.py"


def test_the_flags_of_slime_are_told_as_the_command_line_takes_them():
    document = (DOCS / "coming-from-slime.md").read_text(encoding="utf-8")
    made = script("make_slime_doc")
    assert made.with_tables(document) == document, "run: python scripts/make_slime_doc.py"
    page = (DOCS / "megatron-flags.md").read_text(encoding="utf-8")
    assert made.megatron_page() == page, "run: python scripts/make_slime_doc.py"


def test_the_picture_shows_the_numbers_of_the_measurements():
    drawn = script("make_speedup_picture").picture((DOCS / "measurements.md").read_text(encoding="utf-8"))
    assert (DOCS / "speedup.svg").read_text(encoding="utf-8") == drawn, "run: python scripts/make_speedup_picture.py"


def test_the_picture_of_what_speculation_pays_shows_the_numbers_of_the_measurements():
    drawn = script("make_pays_picture").picture((DOCS / "measurements.md").read_text(encoding="utf-8"))
    assert (DOCS / "pays.svg").read_text(encoding="utf-8") == drawn, "run: python scripts/make_pays_picture.py"


def test_every_number_of_the_results_stands_in_the_lab_book():
    _, _, rest = (DOCS / "measurements.md").read_text(encoding="utf-8").partition("## Results\n")
    page, _, book = rest.partition("The lab book follows.")
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ")][1:]
    numbers = [number for cell in rows for number in re.findall(r"\d[\d.]*", cell)]
    assert len(numbers) >= 10
    assert not [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", book)]


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    targets = [
        (page, to) for page in pages for to in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    ]
    assert not [f"{page.name}: {to}" for page, to in targets if not (page.parent / to).exists()]
