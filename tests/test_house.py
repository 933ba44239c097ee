"""The shape of the house: no import circle from file to file, no crowded folder, no long module.

Run this file alone to print its sizes: ``python tests/test_house.py``.
"""

import ast
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import megatron_lowbit
from megatron_lowbit import _moved

PACKAGE = Path(megatron_lowbit.__file__).parent
MOST_MODULES = 14
MOST_LINES = 300


def name_of(path: Path, root: Path) -> str:
    """The dotted name of a module's file; `root` is the folder of the package."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_in(root: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    return {name_of(path, root): path for path in sorted(root.rglob("*.py"))}


def imported(name: str, path: Path) -> set[str]:
    """What a file imports, names in modules too: in functions and by strings for importlib."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def circle_in(root: Path) -> list[str]:
    """The modules of one import circle, in order; empty if there is none."""
    modules = {n: p for n, p in modules_in(root).items() if p.name != "__init__.py"}
    edges = {n: imported(n, path) & modules.keys() - {n} for n, path in modules.items()}
    done: set[str] = set()
    for start in edges:
        trail = [start]
        steps = [iter(sorted(edges[start]))]
        while steps:
            following = next(steps[-1], None)
            if following is None:
                steps.pop()
                done.add(trail.pop())
            elif following in trail:
                return [*trail[trail.index(following) :], following]
            elif following not in done:
                trail.append(following)
                steps.append(iter(sorted(edges[following])))
    return []


def folders() -> Counter:
    """Modules in each folder of the package, `__init__.py` not counted."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return Counter(str(path.parent.relative_to(PACKAGE.parent)) for path in paths)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_import_circle_from_file_to_file():
    assert circle_in(PACKAGE) == []


CIRCLES = {
    "at the top": ("from pkg import b", "import pkg.a"),
    "in a function": ("def f():\n    from pkg.b import x", "from pkg import a"),
    "by a string": ("NAMES = {'b': 'pkg.b'}", "from pkg.a import y"),
    "relative": ("from . import b", "from .a import y"),
}


@pytest.mark.parametrize("kind", CIRCLES)
def test_circles_of_every_kind_are_seen(kind, tmp_path):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from pkg import a, b")
    for name, text in zip("ab", CIRCLES[kind], strict=True):
        (package / f"{name}.py").write_text(text)
    assert circle_in(package) == ["pkg.a", "pkg.b", "pkg.a"]
    (package / "b.py").write_text("import os")
    assert circle_in(package) == []


def test_no_folder_is_crowded():
    crowded = {folder: count for folder, count in folders().items() if count > MOST_MODULES}
    assert not crowded, f"more than {MOST_MODULES} modules: {crowded}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: name_of(p, PACKAGE))
def test_no_module_is_long(path):
    assert lines(path) <= MOST_LINES


def test_file_names_are_told_apart_by_themselves():
    """But for kernels that are the same on CPUs and GPUs."""
    names = Counter(p.name for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
    assert {name for name, count in names.items() if count > 1} <= {"rotated.py", "carrying.py"}


@pytest.mark.parametrize("old", _moved.MODULES)
def test_a_moved_module_is_found_with_a_warning_that_names_the_new_one(old):
    new = f"megatron_lowbit.{_moved.MODULES[old]}"
    with pytest.warns(FutureWarning, match=f"is now {new};"):
        # Afresh, as the first import alone warns.
        spec = _moved._Finder().find_spec(f"megatron_lowbit.{old}")
        module = spec.loader.create_module(spec)
        spec.loader.exec_module(module)
    name = next(name for name, value in vars(import_module(new)).items() if callable(value))
    assert getattr(module, name) is getattr(import_module(new), name)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(module, *pair) for module, names in _moved.NAMES.items() for pair in names.items()],
)
def test_a_renamed_name_is_found_with_a_warning_that_names_the_new_one(module, old, new):
    where = import_module(f"megatron_lowbit.{module}")
    own = new.rpartition(".")
    there = import_module(f"megatron_lowbit.{own[0]}") if own[0] else where
    with pytest.warns(FutureWarning, match=rf"\.{old} is now .*\.{new};"):
        assert getattr(where, old) is getattr(there, own[2])


def test_a_module_that_never_was_is_not_found():
    with warnings.catch_warnings(), pytest.raises(ModuleNotFoundError):
        warnings.simplefilter("error")
        import_module("megatron_lowbit.comm.chooser")


def main() -> None:
    """Print the sizes of the house."""
    root = PACKAGE.parent
    package, tests = sorted(PACKAGE.rglob("*.py")), sorted((root / "tests").rglob("*.py"))
    print(f"package {sum(map(lines, package)):,} lines, tests {sum(map(lines, tests)):,}")
    folder, count = folders().most_common(1)[0]
    print(f"fullest folder: {folder}, {count} modules (at most {MOST_MODULES})")
    longest = max(package, key=lines)
    print(f"longest module: {longest.relative_to(root)}, {lines(longest)} (at most {MOST_LINES})")
    readme = (root / "README.md").read_text().splitlines()
    print(f"README.md: {len(readme)} lines (at most 170), the longest of {max(map(len, readme))}")
    print(f"import circles: {' -> '.join(circle_in(PACKAGE)) or 'none'}")


if __name__ == "__main__":
    main()
