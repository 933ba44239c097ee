"""The pages: every README.md. Their links and paths lead somewhere, and the first one is short."""

import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_lowbit.benchmark.quality import kl_against_bits

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_lowbit"
FOLDERS = ("megatron_lowbit", "tools", "examples", "patches", "tests")
PAGES = [ROOT / "README.md", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("README.md")))]
MOST_LINES, MOST_CHARACTERS = 170, 140

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:[ ]{4,}.*\n|\n(?=[ ]{4}))+")
CODE = re.compile(r"`[^`\n]+`")
INLINE = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DEFINED = re.compile(r"^\[([^\]]+)\]: (\S+)$", re.MULTILINE)
REFERENCE = re.compile(r"\[([^\]\[]+)\](?:\[([^\]]*)\])?(?![(\[:])")
# A path in text or in a command, not behind another one, as in Megatron-LM/tools/...
PATH = re.compile(r"(?<![\w./*-])(?:\.\./)*((?:[\w-]+/)+[\w.*-]*)")


def prose(text: str) -> str:
    """A page without its blocks of code, and with inline code emptied."""
    return CODE.sub("``", INDENTED.sub("", FENCED.sub("", text)))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere; those to other machines are not tried."""
    text = prose(page.read_text(encoding="utf-8"))
    defined = {name.lower(): target for name, target in DEFINED.findall(text)}
    named = [(second or first).lower() for first, second in REFERENCE.findall(text)]
    broken = [f"[{name}]" for name in named if name not in defined]
    for target in (*INLINE.findall(text), *defined.values()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = (page.parent / path).resolve() if path else page
        there = anchors(other.read_text(encoding="utf-8")) if anchor and other.is_file() else set()
        if not other.exists() or (anchor and anchor not in there):
            broken.append(target)
    return broken


def missing_paths(page: Path) -> list[str]:
    """The paths on a page that begin with a folder of ours, and are not there."""
    text = page.read_text(encoding="utf-8")
    blocks = [*FENCED.findall(text), *INDENTED.findall(text)]
    code = [*CODE.findall(text), *blocks]
    missing = []
    for path in (found for part in code for found in PATH.findall(part)):
        bases = [base for base in (ROOT, PACKAGE, page.parent) if is_ours(base, path)]
        if bases and not any(list(base.glob(path.rstrip("/"))) for base in bases):
            missing.append(path)
    return missing


def is_ours(base: Path, path: str) -> bool:
    """Whether the first folder of `path` is one of the repository's in `base`."""
    first = base / path.partition("/")[0]
    return first.is_dir() and (base != ROOT or first.name in FOLDERS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_is_there(page):
    assert missing_paths(page) == []


def test_what_leads_nowhere_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `b` (c), d\n\n# Same\n\n# Same\n\n```\n# no\n```\n")
    page = tmp_path / "page.md"
    good = ("other.md#a-b-c-d", "other.md#same-1", "#here", "https://example.com/x#y")
    bad = ("other.md#no", "other.md#same-2", "gone.md", "#there")
    page.write_text(
        "# Here\n\n" + "".join(f"[x]({link})\n" for link in good + bad) + "[undefined]\n"
    )
    assert broken_links(page) == ["[undefined]", *bad]
    page.write_text(
        "`tools/gone.py` `codecs/gone.py` `codecs/base.py` `plot/gone.py`\n\n"
        "    python tools/gone_too.py /tools/x Megatron-LM/tools/y\n    python tools/report.py\n"
        "\n```\nbash examples/gone.sh ../tests/run.sh\n```\n"
    )
    gone = ["tools/gone.py", "codecs/gone.py", "examples/gone.sh", "tools/gone_too.py"]
    assert missing_paths(page) == gone


def test_the_first_page_is_short():
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > MOST_CHARACTERS] == []


def test_every_folder_of_the_package_with_a_layer_of_its_own_has_a_page():
    layers = {p.parent for p in PACKAGE.glob("*/__init__.py")} - {PACKAGE / "model"}
    assert {p.parent for p in PAGES} >= layers


def test_the_picture_shows_what_the_page_says():
    """Every row is read, and the picture that lies there names each of them."""
    points = kl_against_bits.read_rows(kl_against_bits.PAGE.read_text(encoding="utf-8"))
    by_name = {point.text: (point.x, point.y) for point in points}
    assert len(points) == len(by_name) >= 20
    assert by_name["recipe"] == (4.20, 0.0269)
    assert by_name["nvfp4"] == (4.56, 0.0762)
    assert "recipe@two-shot" not in by_name
    picture = kl_against_bits.PICTURE.read_text(encoding="utf-8")
    assert [name for name in by_name if f"<!-- {name} -->" not in picture] == []


def test_the_first_page_has_the_figures_of_the_measured_ones():
    """Each row of quality is in the table it was taken from, with the same figures."""
    measured = kl_against_bits.PAGE.read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([\w@.-]+)`.*?\| (\d\.\d\d) \| (.+) \|$", PAGES[0].read_text(), re.MULTILINE
    )
    assert len(rows) == 5
    for name, bits, divergences in rows:
        name = f"{name}@two-shot" if rows.index((name, bits, divergences)) == 4 else name
        cells = next(line for line in measured.splitlines() if line.startswith(f"| {name} |"))
        _, _, at, _, prose_kl, _, code_kl, _, dialogue_kl = cells.strip("| ").split(" | ")
        assert [bits, *divergences.split(" | ")] == [at, prose_kl, code_kl, dialogue_kl]
