"""The rules of the layout that no linter knows: who imports whom, what is installed, what never appears in the tree."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = ["bufio", "persistent_data", "thinpool", "tools"]  # each may import itself and those to its left
FORMATS = {"construct", "fastcrc", "numpy"}
THIRD_PARTY = {
    "bufio": {"sortedcontainers"},
    "persistent_data": FORMATS,
    "thinpool": FORMATS | {"sortedcontainers"},
    "tools": FORMATS,
    "tools/bench": FORMATS | {"lmdb"},
    "examples": set(),
    "tests": FORMATS | {"sortedcontainers", "pytest", "hypothesis"},
}
NOT_INSTALLED = ["tools/bench"]
LIBRARIES = ["bufio", "persistent_data", "thinpool"]
COMMAND_LINE_MODULES = {"argparse", "getopt", "optparse"}


def modules(*directories: str) -> list[str]:
    """Every module below *directories*, as paths relative to the root, without the data of the tests."""
    found = (path.relative_to(ROOT) for directory in directories for path in (ROOT / directory).rglob("*.py"))
    return sorted(str(path) for path in found if path.parts[:2] != ("tests", "data"))


def parse(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(), module)


def imported_packages(tree: ast.AST) -> set[str]:
    """Top-level packages imported anywhere in *tree*, for type checking and inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names


def part_of(module: str) -> str:
    """The entry of THIRD_PARTY that *module* falls under."""
    return max((part for part in THIRD_PARTY if module.startswith(part + "/")), key=len)


def bound_names(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level, under ``if`` and ``try`` too."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending.extend(ast.iter_child_nodes(node))
    return names


def exported_names(tree: ast.Module) -> list[str] | None:
    """The module's ``__all__``, or None if it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


# Imports


@pytest.mark.parametrize("module", modules(*LAYERS))
def test_imports_point_down(module: str) -> None:
    layer = LAYERS.index(module.partition("/")[0])
    upward = imported_packages(parse(module)) & {*LAYERS[layer + 1 :], "tests", "thinpool_tools"}
    assert not upward, f"{module} imports {upward}, which is above it"


@pytest.mark.parametrize("module", modules(*LAYERS, "examples", "tests"))
def test_third_party_packages_belong_to_the_layer(module: str) -> None:
    ours = {*LAYERS, "tests"}
    foreign = imported_packages(parse(module)) - sys.stdlib_module_names - ours
    unexpected = foreign - THIRD_PARTY[part_of(module)]
    assert not unexpected, f"{module} imports {unexpected}"


@pytest.mark.parametrize("module", [module for module in modules("tools") if part_of(module) == "tools"])
def test_tools_import_each_other_relatively(module: str) -> None:
    """Installed, the package is called thinpool_tools; an absolute import would make a second copy or fail."""
    assert "tools" not in imported_packages(parse(module))


def test_collector_sees_imports_wherever_they_are() -> None:
    source = "import a.b\nif TYPE_CHECKING:\n    from c import d\ndef f():\n    import e\nfrom . import g\n"
    assert imported_packages(ast.parse(source)) == {"a", "c", "e"}


# Libraries do not talk


@pytest.mark.parametrize("module", modules(*LIBRARIES))
def test_libraries_leave_the_command_line_to_the_tools(module: str) -> None:
    tree = parse(module)
    assert not imported_packages(tree) & COMMAND_LINE_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "exit", "input"}, f"{module}:{node.lineno}: {node.func.id}()"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in {"stdout", "stderr", "stdin", "argv", "exit"}, f"{module}:{node.lineno}"


# Names


@pytest.mark.parametrize("module", modules(*LIBRARIES))
def test_module_name_hides_nothing(module: str) -> None:
    path = Path(module)
    if path.stem == "__init__":
        return
    assert path.stem not in sys.stdlib_module_names, f"{module} has the name of a standard module"
    public = exported_names(parse(str(path.with_name("__init__.py")))) or []
    assert path.stem not in public, f"{module} has the name of a public object of its package"


@pytest.mark.parametrize("module", modules(*LAYERS, "examples", "tests"))
def test_exported_names_exist_once(module: str) -> None:
    tree = parse(module)
    exported = exported_names(tree)
    if exported is not None:
        assert len(set(exported)) == len(exported), f"{module}: a name is in __all__ twice"
        missing = set(exported) - bound_names(tree)
        # A package may load its names when they are asked for: what it declares then is in __getattr__'s table.
        if missing and "__getattr__" not in bound_names(tree):
            pytest.fail(f"{module}: __all__ has {missing}, the module does not")


# What is installed


@pytest.mark.parametrize("package", LAYERS)
def test_package_is_typed_and_described(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    assert ast.get_docstring(parse(f"{package}/__init__.py"))


def test_packages_listed_are_those_in_the_tree(project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    listed = {setuptools["package-dir"].get(name, name.replace(".", "/")) for name in setuptools["packages"]}
    in_tree = {str(Path(module).parent) for module in modules(*LAYERS)}
    assert listed == in_tree - set(NOT_INSTALLED)
    for directory in listed:
        assert (ROOT / directory / "__init__.py").exists()
    for directory in NOT_INSTALLED:
        assert not (ROOT / directory / "__init__.py").exists()


def test_every_tool_has_a_script(project: dict[str, Any]) -> None:
    programs = {Path(module).stem for module in modules("tools") if re.fullmatch(r"tools/thin_\w+\.py", module)}
    assert project["project"]["scripts"] == {name: f"thinpool_tools.{name}:main" for name in programs}
    for name in programs:
        assert "main" in bound_names(parse(f"tools/{name}.py"))


# What never appears


SKIPPED_DIRECTORIES = {".git", ".venv", "build", "dist", "__pycache__", "bench-results"}
FORBIDDEN = re.compile(r"/(?:home|opt|root|work|Users)/\w|py[p]i\.org|pythonhoste[d]\.org")


def text_files() -> list[Path]:
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part.endswith("_cache") for part in parts) or ".hypothesis" in parts
        egg = any(part.endswith(".egg-info") for part in parts)
        if path.is_file() and path.suffix != ".xz" and not hidden and not egg and not SKIPPED_DIRECTORIES & {*parts}:
            found.append(path)
    return found


def test_no_file_names_a_machine_or_a_registry() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not hits, "\n".join(hits)
