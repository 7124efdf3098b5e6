"""Run one menu of parts on this machine's GPU, or rehearse it on the CPU; every part's rows are kept at once.

    python3 scripts/gpu/prove.py engine --revision $(git rev-parse HEAD)        on a GPU, nine minutes at most
    python3 scripts/gpu/prove.py engine --device cpu                            the rehearsal

A part that fails, hangs or does not fit in the time that is left is told in the report, and the next one goes on. The
parts that no visit has measured on this card come first, then those whose figures are oldest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import ledger
from menus import MENUS, Part

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "scripts" / "gpu" / "stand_ins.py"
TAIL = 2_000  # characters of a failed part's output that the report keeps; its log has all


def run_part(part: Part, limit_s: float, device: str, folder: Path, stand_ins: Path) -> dict[str, Any]:
    """Run a part's command within a limit; return its rows, and why it failed where it did."""
    name = part.name.replace(" ", "-")
    report, log = folder / f"{name}.report.json", folder / f"{name}.log"
    report.unlink(missing_ok=True)
    command = part.command(device, report, stand_ins)
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            failure = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"no end in {limit_s:.0f} s"
        finally:
            end_group(process)
    rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"] if report.is_file() else []
    # A benchmark ends with code 1 where a row does not reach its bound: its rows say so themselves.
    if failure == "exit code 1" and any(row["holds"] is False for row in rows):
        failure = ""
    if failure:
        failure += f": {log.read_text(errors='replace')[-TAIL:]}"
    seconds = round(time.monotonic() - started, 1)
    return {"part": part.name, "command": shlex.join(command), "seconds": seconds, "failure": failure, "rows": rows}


def environment() -> dict[str, str]:
    """Return this process's environment, in which Python finds the project first."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever the part's process has left in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def card(device: str) -> tuple[str, dict[str, str]]:
    """Return the card's name and the versions that figures depend on, asked in a process that ends again."""
    words = (
        "import json, torch, transformers; cuda = torch.cuda.is_available(); print(json.dumps([torch.cuda."
        "get_device_name(0) if cuda else '', {'torch': torch.__version__, 'transformers': transformers.__version__}]))"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    name, versions = json.loads(done.stdout.splitlines()[-1])
    if device == "cuda" and not name:
        sys.exit("error: --device cuda needs a GPU that torch sees; rehearse with --device cpu")
    return (name if device == "cuda" else platform.processor() or platform.machine()), versions


def visit(menu: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts in turn; the report is written anew after each, and again at the end.

    The deadline counts from the first part on. A part that may not have its whole limit still has what is left, if that
    is half of the limit: most end long before it.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    name, versions = card(options.device)
    parts = {part.name: part for part in MENUS[menu] if not options.only or part.name in options.only}
    stand_ins = options.out / "stand-ins"
    if options.device == "cpu" and not stand_ins.is_dir():
        subprocess.run([sys.executable, str(STAND_INS), str(stand_ins)], check=True, env=environment())
    report: dict[str, Any] = {
        "menu": menu,
        "device": options.device,
        "card": name,
        "revision": options.revision,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions, "python": platform.python_version()},
        "parts": [],
        "left_out": [],
    }
    began = time.monotonic()
    for each in ledger.in_turn(parts, ledger.read(), name):
        part, left_s = parts[each], options.deadline - (time.monotonic() - began)
        if left_s < part.limit_s / 2:
            report["left_out"].append(each)
        else:
            limit_s = min(part.limit_s, left_s)
            report["parts"].append(run_part(part, limit_s, options.device, options.out, stand_ins))
            tell(report["parts"][-1])
        (options.out / f"{menu}.json").write_text(json.dumps(report, indent=1) + "\n")
    report["seconds"] = round(time.monotonic() - began, 1)
    (options.out / f"{menu}.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def tell(part: dict[str, Any]) -> None:
    lines = [f"== {part['part']}: {part['seconds']} s{', FAILED ' + part['failure'] if part['failure'] else ''}"]
    for row in part["rows"]:
        bound = f"  ({row['reach']}: {'yes' if row['holds'] else 'NO'})" if row["reach"] else ""
        value = "none" if row["value"] is None else f"{row['value']:.5g}"
        lines.append(f"{row['id']:56} {value:>12} {row['unit']}{bound}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("menu", choices=MENUS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts of the menu alone")
    parser.add_argument("--deadline", type=float, default=540.0, metavar="S", help="seconds for the whole menu (540)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the reports (runs/gpu)")
    parser.add_argument("--revision", default="unknown", help="the commit that is measured")
    report = visit((options := parser.parse_args(argv)).menu, options)
    failed = [part["part"] for part in report["parts"] if part["failure"]]
    told = f"{report['seconds']} s; failed: {failed}; left out for want of time: {report['left_out']}"
    sys.stdout.write(f"{report['menu']} on {report['card']}: {told}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
