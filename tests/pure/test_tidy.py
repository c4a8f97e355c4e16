"""What nobody should have to look after: lengths of lines and modules, references that lead somewhere, dead names."""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.patience import TIMEOUT

pytestmark = pytest.mark.xdist_group("tidy")  # all of Python is parsed once

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("ring", "virtio", "vhost", "qcow2")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for room in (*ROOMS, "bench", "tests", "examples", "share") for path in sorted((ROOT / room).rglob("*"))]
PYTHON = [path for path in CODE if path.suffix == ".py"]
C = [path for path in CODE if path.suffix in {".c", ".h"}]
WORD = re.compile(r"\b[A-Za-z_]\w*\b")


def in_rooms(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.relative_to(ROOT).parts[0] in ROOMS]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line outside tables, figures and code."""
    code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("```"):
            code = not code
        elif not code and not line.startswith("|"):
            yield number, line


def test_lines_of_prose_fit() -> None:
    assert [f"{name_of(path)}:{n}" for path in DOCS for n, line in prose(path) if len(line) > 100] == []


def test_make_alone_does_nothing_but_help() -> None:
    would, helps = (
        subprocess.check_output(["make", "-n", *target], cwd=ROOT, text=True, timeout=TIMEOUT)
        for target in ((), ("help",))
    )
    assert would == helps


def laws() -> set[int]:
    """Numbers of the laws that there are."""
    text = (ROOT / "docs" / "laws.md").read_text()
    return {int(number) for number in re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)}


LAW = re.compile(r"\b[Ll]aws? (\d+)(?:(?:,| and| to| or) (\d+))?\b")


def test_laws_that_are_referred_to_exist() -> None:
    known = laws()
    assert known == set(range(1, len(known) + 1))
    assert [
        f"{name_of(path)}: law {number}"
        for path in [*DOCS, *PYTHON, *C]
        for found in LAW.findall(path.read_text())
        for number in found
        if number and int(number) not in known
    ] == []


# References of the docs: `file`, `file:function`, `Class.member`, `function()`.

QUOTED = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"([\w./*-]+\.(?:py|c|h|cdef|md|sh|supp))(?::([\w.]+))?")
MEMBER = re.compile(r"([A-Z]\w*[a-z]\w*)\.(\w+)(?:\(\))?")
DIRECTORY = re.compile(r"((?:ring|virtio|vhost|qcow2|tests|bench|docs|share|examples)(?:/[\w-]+)*)/")
FOREIGN = {"Dockerfile"}  # names that look like ours and are not


def files(name: str) -> list[Path]:
    """Files that a text may mean by *name*: a path from the root, or its end."""
    return [path for path in ROOT.glob(name) if path.is_file()] or [
        path for path in [*CODE, *DOCS] if "*" not in name and f"/{name_of(path)}".endswith(f"/{name}")
    ]


@cache
def members() -> dict[str, set[str]]:
    """Of each class of Python, by name, what is assigned or defined in it, or in those that it extends."""
    found: dict[str, set[str]] = {}
    extended: dict[str, set[str]] = {}
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(WORD.findall(ast.unparse(node)))
                extended.setdefault(node.name, set()).update(
                    base.id for base in node.bases if isinstance(base, ast.Name)
                )

    def of(name: str, below: frozenset[str]) -> set[str]:
        bases = extended.get(name, set()) - below
        return found.get(name, set()).union(*(of(base, below | bases) for base in bases))

    return {name: of(name, frozenset({name})) for name in found}


def defines(path: Path, function: str) -> bool:
    """Whether *path* has a definition of *function*, or of the class and member that it is."""
    text = path.read_text()
    return all(
        re.search(rf"\b(?:def|class) {part}\b|^{part} =|\b{part}\(", text, re.MULTILINE) for part in function.split(".")
    )


def broken_references(text: str) -> Iterator[str]:
    """Yield what *text* quotes as a file, function, member or folder of ours, and is none."""
    classes = members()
    for quoted in QUOTED.findall(text):
        if (match := FILE.fullmatch(quoted)) and quoted not in FOREIGN:
            found = files(match[1])
            if not found or (match[2] and not any(defines(path, match[2]) for path in found)):
                yield quoted
        elif match := MEMBER.fullmatch(quoted):
            if match[1] in classes and match[2] not in classes[match[1]]:
                yield quoted
        elif (match := DIRECTORY.fullmatch(quoted)) and not (ROOT / match[1]).is_dir():
            yield quoted


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_what_docs_refer_to_exists(path: Path) -> None:
    assert list(broken_references(path.read_text())) == []


def test_a_broken_reference_is_seen() -> None:
    text = "`ring/none.c`, `ring/commit.c:nothing_here`, `Links.nothing_here`, `qcow2/attic/`, `ring/commit.c`"
    assert list(broken_references(text)) == text.replace("`", "").split(", ")[:4]


# Dead names: what a room offers and nobody uses.

USED_UNSEEN = {
    "BuildNative": "pyproject.toml",
    "seekable": "io.RawIOBase calls it",
    "DiskFileSystem": "pyproject.toml: fsspec finds it",
    **dict.fromkeys(("protocol", "cachable", "ls", "_strip_protocol", "_open"), "fsspec calls them"),
    **dict.fromkeys(
        ("aread", "areadinto", "awrite", "awrite_zeroes", "adiscard", "aflush", "aclose"),
        "the library's user calls them",
    ),
    **dict.fromkeys(("algorithm", "DEFAULT_ITER_TIME_MS", "secrets_of", "keep_secrets", "free_slot"), "to make LUKS"),
    **dict.fromkeys(("BITMAP_TABLE_OFFSET", "MAX_BITMAP_NAME_BYTES"), "to make bitmaps"),
    **dict.fromkeys(("MIN_CLUSTER_BITS_OF_SUBCLUSTERS", "L1_ENTRY_SIZE"), "to read subclusters"),
    **dict.fromkeys(("HEADER_BACKING", "HEADER_BACKING_OFFSET"), "two fields of the header"),
}
TYPED_FACES = {"ring/native.py", "qcow2/native.py"}  # a declaration in them is no use


def definitions(path: Path) -> Iterator[str]:
    """Yield names of functions, methods, classes and constants of *path*."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("__"):
            yield node.name
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets += [statement.target] if isinstance(statement, ast.AnnAssign) else []
        yield from (target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("__"))


def words(paths: list[Path]) -> Counter[str]:
    counter: Counter[str] = Counter()
    for path in paths:
        counter.update(WORD.findall(path.read_text()))
    return counter


def test_each_name_of_python_is_used() -> None:
    python = [path for path in PYTHON if name_of(path) not in TYPED_FACES]
    defined = Counter(name for path in in_rooms(python) for name in definitions(path))
    used = words(python) - words([Path(__file__)])
    assert {name for name, count in defined.items() if used[name] <= count} - set(USED_UNSEEN) == set()


DECLARATION = re.compile(r"^(?!static|typedef)[a-z_][\w ]*[ *](\w+)\((?:[^;{}]*)\);", re.MULTILINE)


def test_each_function_of_a_header_is_used() -> None:
    """By another line of C, or by Python."""
    c = words(C)
    python = words([path for path in PYTHON if name_of(path) not in TYPED_FACES]) - words([Path(__file__)])
    headers = [path for path in in_rooms(C) if path.suffix == ".h"]
    declared = {name for path in headers for name in DECLARATION.findall(path.read_text())}
    assert len(declared) > 100
    dead = {name for name in declared if c[name] <= 2 and not python[name]}
    assert dead - {"stock_clear", "l2map_entry"} == set()


# Sizes.

LONGEST = 400  # lines: 300 and a third
LONGER = {
    "ring/worker.h": "the worker's record, and all that Python calls",
    "ring/queue.c": "a queue's whole life, which one state machine is",
    "ring/threads.c": "the second implementation of uring.c, with its own queue and threads",
    "virtio/block.c": "one device",
}


def test_modules_are_short_or_say_why_not() -> None:
    long = {name_of(path) for path in in_rooms([*PYTHON, *C]) if len(path.read_text().splitlines()) > LONGEST}
    assert long - set(LONGER) == set()


def test_constructors_take_seven_arguments_at_most() -> None:
    """What always travels together is one record."""
    wide = [
        f"{name_of(path)}:{node.lineno}"
        for path in in_rooms(PYTHON)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        if len(node.args.args) + len(node.args.kwonlyargs) > 8  # and self
    ]
    assert wide == []


def catch_alls(path: Path) -> Iterator[tuple[int, bool]]:
    """Yield the line of each handler of everything, and whether it lets what it caught go on, or says why not."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = {"BaseException"} if node.type is None else set(WORD.findall(ast.unparse(node.type)))
            last = node.body[-1]
            goes_on = isinstance(last, ast.Raise) and last.exc is None
            if caught & {"Exception", "BaseException"}:
                yield node.lineno, goes_on or "  # " in lines[node.lineno - 1]


def test_who_catches_everything_raises_it_on_or_says_why_not() -> None:
    handlers = [(f"{name_of(path)}:{line}", is_good) for path in in_rooms(PYTHON) for line, is_good in catch_alls(path)]
    assert len(handlers) > 10
    assert [where for where, is_good in handlers if not is_good] == []


def filled_lines(paths: list[Path]) -> int:
    return sum(1 for path in paths for line in path.read_text().splitlines() if line.strip())


def awaits_at_its_end(text: str) -> Iterator[int]:
    """Lines of what waits once its coroutine is closed, which Python does not allow: it says so on standard error."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Try):
            handlers = [
                each for each in node.handlers if each.type is None or "BaseException" in ast.unparse(each.type)
            ]
            for statement in [*node.finalbody, *(line for each in handlers for line in each.body)]:
                waits = (ast.Await, ast.AsyncFor, ast.AsyncWith)
                found = [each for each in ast.walk(statement) if isinstance(each, waits)]
                yield from (each.lineno for each in found if "__aexit__()" not in ast.unparse(each))  # it gives back


def test_no_coroutine_waits_as_it_is_closed() -> None:
    found = {name_of(path): [*awaits_at_its_end(path.read_text())] for path in in_rooms(PYTHON)}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_c_is_less_than_half_of_python() -> None:
    assert filled_lines(in_rooms(C)) < 0.5 * filled_lines(in_rooms(PYTHON))


def test_the_last_commits_say_what_and_why() -> None:
    log = ["git", "-C", str(ROOT), "log", "--no-merges", "-30", "--format=%s%x00%b%x01"]
    run = subprocess.run(log, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if run.returncode:
        pytest.skip("the sources are no clone of git's")
    commits = [commit.strip().split("\0") for commit in run.stdout.split("\1") if commit.strip()]
    wrong = {subject for subject, body in commits if len(subject) > 72 or ": " not in subject or not body.strip()}
    assert wrong == set()


def test_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist tells by the id, which pytest 9.2 keeps elsewhere: there it groups nothing, and does not say so."""
    assert not getattr(request.config.option, "loadgroup", False) or request.node.nodeid.endswith("@tidy")
