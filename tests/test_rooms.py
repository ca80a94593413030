"""The map of the package in CONTRIBUTING.md, held against the imports: nothing is imported from a room above."""

import ast
import re

from conftest import ROOT


ROWS = [line.split("|")[1:-1] for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line[:3] == "| `"]
ROOMS = {name: number for number, row in enumerate(ROWS) for name in re.findall(r"`([\w/.]+)`", row[0])}


def room_of(path: str) -> str:
    """The entry of the map that a Python file belongs to."""
    return next(name for name in ROOMS if path == name or name.endswith("/") and path.startswith(name))


def imports_of(path) -> set[str]:
    """Our own files that a file imports, as paths in the repository."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import from glance by its full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    files = {f"{name.replace('.', '/')}.py" for name in names}
    return {name for name in files if (ROOT / name).is_file()}


def sources() -> list:
    return [path for path in [*ROOT.glob("*.py"), *ROOT.glob("glance/**/*.py")] if path.name != "__init__.py"]


def test_three_python_files_stand_in_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == {"train_glance_lora.py", "infer_glance.py", "glance_utils.py"}


def test_every_file_has_its_room_and_every_room_its_files():
    assert {room_of(str(path.relative_to(ROOT))) for path in sources()} == set(ROOMS)


def test_no_import_goes_up():
    for path in sources():
        name = str(path.relative_to(ROOT))
        for imported in imports_of(path):
            assert ROOMS[room_of(imported)] >= ROOMS[room_of(name)], f"{name} imports {imported}, which is above it"


def test_the_file_to_copy_imports_nothing_of_ours():
    assert imports_of(ROOT / "glance_utils.py") == set()


def test_what_is_copied_with_it_imports_nothing_else():
    for path in ROOT.glob("glance/ask/*.py"):
        assert all(name == "glance_utils.py" or name.startswith("glance/ask/") for name in imports_of(path)), path
