"""Packages with codecs, installed for a test: a module, and metadata that names its codecs."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_lowbit.codecs.foreign import loading

PAGE = Path(loading.__file__).parents[1] / "README.md"
NAME = "acme-int6"


def example() -> str:
    """The codec that the page shows."""
    section = PAGE.read_text(encoding="utf-8").split("## A codec of another package\n")[1]
    return re.search(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1]


def install(
    place: Path,
    source: str,
    *,
    package: str = "acme",
    names: tuple[str, ...] = (NAME,),
    kind: str = "Int6Token",
) -> None:
    """Install a package of one module into a folder that is on Python's path."""
    (place / f"{package}_codecs.py").write_text(source, encoding="utf-8")
    info = place / f"{package}-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = [f"{name} = {package}_codecs:{kind}" for name in names]
    (info / "entry_points.txt").write_text(f"[{loading.GROUP}]\n" + "\n".join(lines))


def forget() -> None:
    """Look at what is installed anew."""
    for cached in (loading.declared, loading._load, loading._check_once):
        cached.cache_clear()


@contextmanager
def looked_at_anew() -> Iterator[None]:
    """What is installed inside is known there, and nothing of it is afterwards."""
    before = set(sys.modules)
    forget()
    try:
        yield
    finally:
        forget()
        for name in set(sys.modules) - before:
            if name.endswith("_codecs"):
                del sys.modules[name]


Installer = Callable[..., None]


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Iterator[Installer]:
    """Installs a package as `install` does."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(*args, **settings) -> None:
        install(tmp_path, *args, **settings)
        forget()

    with looked_at_anew():
        yield put
