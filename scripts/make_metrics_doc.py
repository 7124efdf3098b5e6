"""Write docs/metrics.md from the metric table: ``python scripts/make_metrics_doc.py``."""

from pathlib import Path

from slime_spec.metrics.table import markdown

DOC = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

if __name__ == "__main__":
    DOC.write_text(markdown(), encoding="utf-8")
