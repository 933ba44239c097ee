"""Writing that leaves nothing half done: temporary sibling, fsync, rename."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_lowbit.errors import LowbitError

# What holds the package: a checkout, with tools/ and examples/ beside it, or site-packages.
ROOT = Path(__file__).resolve().parents[1]


def is_checkout() -> bool:
    """Whether this package is in a checkout, and not installed."""
    return (ROOT / "tools" / "setup_env.sh").is_file()


def in_checkout(path: str) -> Path:
    """A file or folder of a checkout that is not part of the package.

    Raises:
        LowbitError: There is none here: the package was installed.
    """
    if not is_checkout():
        raise LowbitError(
            f"{path} is not in the package that was installed in {ROOT}: run this in a checkout of "
            "megatron_lowbit"
        )
    return ROOT / path


def commit() -> str:
    """The commit of the checkout that this package is in, marked if files differ from it."""
    if not is_checkout():  # a folder of packages can lie in a checkout of something else
        return "unknown"
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    if found.returncode != 0:
        return "unknown"
    return found.stdout.strip() + (" and changes" if status.stdout.strip() else "")


def sources_digest() -> str:
    """sha256 of this package's sources: tells a copy's commit where there is no git."""
    package, found = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.*")):
        if path.suffix in (".py", ".c", ".h"):
            found.update(f"{path.relative_to(package).as_posix()}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def import_path() -> str:
    """PYTHONPATH for a process that is to find the modules that this one finds."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that takes `target`'s place when the block ends without error.

    On any error, Ctrl-C included, the temporary directory is removed and `target` stays as it was.
    Files and directory are flushed to disk before the rename. A link stays a link: what it leads to
    is replaced.

    Raises:
        LowbitError: `target` leads nowhere, to something else than a directory, or is where a disk
            is mounted, which cannot be renamed.
    """
    target = _followed(Path(target).absolute())
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        for file in staging.rglob("*"):
            flush(file)
        flush(staging)
        _swap(staging, target)
        flush(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_atomic(target: Path, data: bytes) -> None:
    """Write one file in `target`'s place, or in that of what it links to; all of it or none."""
    target = Path(os.path.realpath(target))
    staging = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        write(staging, data)
        flush(staging)
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def replace_together(contents: dict[Path, bytes]) -> None:
    """Replace files that exist: all of them, or on any error none. Their modes are kept.

    Success means that each file was read again, and holds what was to be written. Each is renamed
    into place, so a file that is hard-linked into a package manager's cache is replaced here and
    not changed there.

    Raises:
        LowbitError: A file holds something else than was written.
        OSError: One cannot be read or written.
    """
    before = {path: path.read_bytes() for path in contents}
    staged = {path: path.with_name(f".{path.name}.tmp-{os.getpid()}") for path in contents}
    done: list[Path] = []
    try:
        for path, data in contents.items():
            _stage(staged[path], data, path)
        for path in contents:
            done.append(path)
            os.replace(staged[path], path)
        for path, data in contents.items():
            if path.read_bytes() != data:
                raise LowbitError(f"{path} does not hold what was written to it: try again")
    except BaseException:
        for path in done:
            _stage(staged[path], before[path], path)
            os.replace(staged[path], path)
        raise
    finally:
        for staging in staged.values():
            staging.unlink(missing_ok=True)


def _stage(staging: Path, data: bytes, target: Path) -> None:
    """Write what shall take `target`'s place, with its mode."""
    write(staging, data)
    shutil.copymode(target, staging)
    flush(staging)


def write(path: Path, data: bytes) -> None:
    """Write a file; an error, such as a full disk, names it (the system's own does not)."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_writable(directory: Path) -> None:
    """Raise `OSError` now, and not after the work, if nothing can be created in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tempfile.NamedTemporaryFile(prefix=".tmp-", dir=directory).close()


def check_output(path: Path, flag: str = "--output") -> None:
    """Raise now, and not after the work, if a file cannot be written as `path`.

    Args:
        path: Of the file; its directory is made.
        flag: The option that names it, for messages.

    Raises:
        LowbitError: It is a directory, or a device or FIFO (renaming would replace it), or nothing
            can be created beside it.
    """
    if path.is_dir():
        raise LowbitError(f"{flag} {path} is a directory: name a file")
    if path.exists() and not path.is_file():
        raise LowbitError(f"{flag} {path} is not a regular file: name another")
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # With the name that the file itself is first written under, which is longer.
        tempfile.NamedTemporaryFile(prefix=f".{path.name}.tmp-", dir=parent).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise LowbitError(f"{flag} {path} cannot be written: {why}") from None


def flush(path: Path) -> None:
    """Force a file's or a directory's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def _followed(target: Path) -> Path:
    """The directory that `target` is, or links to; see `atomic_directory`."""
    if target.is_symlink() and not target.exists():
        raise LowbitError(
            f"{target}: a link to {os.readlink(target)}, which is not there: remove the link"
        )
    if target.exists() and not target.is_dir():
        raise LowbitError(f"{target}: exists and is not a directory: name another")
    real = Path(os.path.realpath(target))
    if os.path.ismount(real):
        raise LowbitError(f"{target}: a disk is mounted there: name a directory in it")
    return real


def _swap(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; an old `target` is set aside first and removed last."""
    if not target.exists():
        os.rename(staging, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        os.rename(target, old / target.name)
        os.rename(staging, target)
    except BaseException:
        if not target.exists():
            os.rename(old / target.name, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
