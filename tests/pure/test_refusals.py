"""Every refusal of an image is in docs/refusals.md, by the words that it has, and nothing else is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
ROOMS = ("qcow2", "vhost")
Texts = dict[str, list[tuple[int, str]]]  # what a name was set to, by line


def text_of(node: ast.expr, texts: Texts) -> str:
    """The string that *node* makes, with an ellipsis for what varies."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part, texts) for part in parts)
        case ast.FormattedValue(value=value):
            return text_of(value, texts)
        case ast.Name(id=name):
            return next((text for line, text in reversed(texts.get(name, [])) if line < node.lineno), "…")
    return "…"


def refusals_of(function: ast.AST) -> Iterator[str]:
    texts: Texts = {}
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant() | ast.JoinedStr()):
                texts.setdefault(name, []).append((node.lineno, text_of(node.value, {})))
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name(id="UnsupportedImage"), args=[_, reason]):
                yield text_of(reason, texts)


def raised() -> set[str]:
    found: set[str] = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.update(refusals_of(node))
    return found


def documented() -> set[str]:
    return set(re.findall(r"^\| `([^`]*)` \|", (ROOT / "docs" / "refusals.md").read_text(), re.MULTILINE))


def test_docs_name_every_refusal() -> None:
    assert len(raised()) > 60
    assert sorted(raised() - documented()) == [], "not in docs/refusals.md"
    assert sorted(documented() - raised()) == [], "nobody says so any more"
