"""tests/PITFALLS.rst names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from docutils import nodes
from docutils.core import publish_doctree

TESTS = Path(__file__).parent
PAGE = TESTS / "PITFALLS.rst"
_NAMED = re.compile(r"``(\w+/\w+\.py)::(\w+)``")


def functions_of(path: Path) -> set[str]:
    """The functions that a module defines."""
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_test_named_exists() -> None:
    named = _NAMED.findall(PAGE.read_text())
    assert len(named) > 50
    missing = {f"{p}::{n}" for p, n in named if n not in functions_of(TESTS / p)}
    assert not missing


def test_each_row_names_a_test() -> None:
    page = publish_doctree(PAGE.read_text(), settings_overrides={"halt_level": 2})
    rows = [row for body in page.findall(nodes.tbody) for row in body.findall(nodes.row)]
    assert len(rows) > 25
    for row in rows:
        assert "::test_" in row.children[1].astext(), row.astext()
