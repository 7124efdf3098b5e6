"""Write docs/doctor.md from the doctor's checks: ``python scripts/make_doctor_doc.py``."""

from pathlib import Path

from slime_spec.launch.doctor import USAGE
from slime_spec.preflight.document import markdown

DOC = Path(__file__).resolve().parent.parent / "docs" / "doctor.md"

if __name__ == "__main__":
    DOC.write_text(markdown(USAGE), encoding="utf-8")
