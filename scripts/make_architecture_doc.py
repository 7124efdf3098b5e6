"""Write the file tree of docs/architecture.md, a phrase per file: ``python scripts/make_architecture_doc.py``."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: scripts/make_architecture_doc.py -->\n```text\n", "```\n<!-- /tree -->"
FOLDERS = ("slime_spec", "rollout", "trainer_bridge", "scripts", "conf")


def phrase(path: Path) -> str:
    """Return the first sentence of a module's docstring, or of a script's first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        comments = (line[2:] for line in text.splitlines() if line.startswith("# ") and "shellcheck" not in line)
        first = next((line for line in comments if not line.startswith("@")), "")
    return first.removesuffix(".")


def tree() -> str:
    """Write one line per tracked file of the product, folders with the phrase of their __init__.py."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    lines: list[str] = []
    seen: set[Path] = set()
    there = {
        ROOT / name for name in listed if (ROOT / name).is_file()
    }  # without deleted files that are still in the index
    for path in sorted(there, key=lambda path: (path.parent, path.name)):
        folder = path.parent.relative_to(ROOT)
        if path.parent not in seen:
            seen.add(path.parent)
            init = path.parent / "__init__.py"
            about = phrase(init) if init.is_file() else ""
            lines.append(f"{folder}/".ljust(34) + about)
        if path.name != "__init__.py" and path.suffix not in (".json", ".safetensors"):
            lines.append(f"  {path.name}".ljust(34) + phrase(path))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def with_tree(document: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{tree()}{END}{after}"


if __name__ == "__main__":
    DOC.write_text(with_tree(DOC.read_text(encoding="utf-8")), encoding="utf-8")
