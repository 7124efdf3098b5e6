"""Which names a source imports, read from its text."""

from __future__ import annotations

import ast


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(source: str, *, at_import_time: bool = False) -> set[str]:
    """Names that a source imports, ``from a import b`` as both ``a`` and ``a.b``.

    With ``at_import_time`` only what importing the module executes: no function bodies, no TYPE_CHECKING blocks.
    """
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if at_import_time and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: write the whole path"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        waiting.extend(ast.iter_child_nodes(node))
    return names
