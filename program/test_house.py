"""The shape of the project: who may import whom, and how long the book may be.

The book stands at the bottom and knows none of the folders; among these, each knows only those named here.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGETS = {"transgan.py": 820, "autograd.py": 900, "data.py": 280, "test_transgan.py": 1000, "README.md": 330}
BOOK = {"autograd", "data", "transgan"}
MAY_IMPORT = {
    "autograd": set(),
    "data": set(),
    "transgan": {"autograd", "data"},
    "fast": BOOK,
    "store": BOOK,
    "paper": BOOK | {"fast", "store"},
    "look": BOOK | {"fast", "store"},
    "program": BOOK | {"fast", "store", "paper", "look"},
    "benchmarks": BOOK | {"fast", "store", "paper", "look", "program"},
}


def imported(path):
    """The top-level modules and folders of ours that a file imports, anywhere but under __name__ == "__main__"."""
    tree, found = ast.parse(path.read_text()), set()
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found |= {name.split(".")[0] for name in names}
    return found & MAY_IMPORT.keys()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_nobody_imports_who_stands_above(part):
    files = sorted((ROOT / part).glob("*.py")) or [ROOT / f"{part}.py"]
    for path in files:
        if not path.name.startswith(("test_", "support", "rehearsal")):  # tests stand above all
            assert imported(path) <= MAY_IMPORT[part] | {part}, path.name


@pytest.mark.parametrize("name", BUDGETS)
def test_the_book_stays_a_book(name):
    assert len((ROOT / name).read_text().splitlines()) <= BUDGETS[name]


def test_fast_forms_know_the_engine_alone():
    """But for the augmentation's, which is of the networks."""
    for path in (ROOT / "fast").glob("*.py"):
        if not re.match("test_|rehearsal|augment|compile", path.name):
            assert imported(path) <= {"autograd", "fast"}


def test_top_level_holds_the_book_and_nothing_else():
    assert {path.name for path in ROOT.glob("*.py")} == {name for name in BUDGETS if name.endswith(".py")}
