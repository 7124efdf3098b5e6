"""No file that is read can run code: torch.load reads plain types, and one restricted unpickler reads metadata."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.test_imports import MODULES

RESTRICTED = "trainer_bridge.megatron.no_code"  # subclasses Unpickler, and says which classes may be named
# Its loader is yaml.SafeLoader with stricter keys.
SAFE = {("slime_spec.config.build", "yaml.load(text, Loader=_Loader)")}
# Calls that execute what they read, whatever their arguments.
EXECUTES = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"}
EXECUTES |= {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "cloudpickle.load", "cloudpickle.loads"}


def executing(source: str) -> list[str]:
    """The calls in a source that would execute code of a file."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = [ast.unparse(call) for call in calls if ast.unparse(call.func) in EXECUTES]
    for call in calls:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        is_unsafe = ast.unparse(call.func) == "torch.load" and given.get("weights_only") != "True"
        if is_unsafe or given.get("allow_pickle") == "True" or given.get("trust_remote_code") == "True":
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {RESTRICTED}))
def test_a_module_reads_no_file_that_could_run_code(module: str) -> None:
    assert {(module, call) for call in executing(Path(MODULES[module]).read_text())} <= SAFE


@pytest.mark.parametrize(
    ("call", "is_found"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("pickle.loads(data)", True),
        ("pickle.dumps(data)", False),
        ("numpy.load(path, allow_pickle=True)", True),
        ("AutoTokenizer.from_pretrained(path, trust_remote_code=True)", True),
    ],
)
def test_such_a_call_would_be_seen(call: str, is_found: bool) -> None:
    assert bool(executing(call)) == is_found
