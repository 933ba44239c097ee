#!/usr/bin/env python3
"""Make the support matrix of megatron_lowbit/integration/README.md from tests that ran.

Runs the tests that are marked `support(capability, release)` (about 5 minutes), or reads the JUnit
report of a run of them, and prints the table: a row for each capability, a column for each release
of megatron-core; "main" is the checkout of Megatron-LM that MEGATRON_LM names. --write puts the
table into that page, between its two marker lines; a run with failures is not written.

examples:
  MEGATRON_LM=~/Megatron-LM tools/support_matrix.py --write
  pytest -c tests/pytest.ini --rootdir=. -m support --junit-xml=support.xml tests/integration
  tools/support_matrix.py --results support.xml
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a plain checkout

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import write_atomic
from megatron_lowbit.text_table import markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "megatron_lowbit" / "integration" / "README.md"
PROPERTY, SEPARATOR = "support", " @ "
BEGIN = "<!-- support matrix: made by tools/support_matrix.py -->"
END = "<!-- end of the support matrix -->"
# The outcome that tells most about a cell with several tests comes first.
OUTCOMES = ("failed", "no", "yes", "not run")
NO_RESULT = "its tests have not been run on this release"


@dataclass(frozen=True)
class Cell:
    """What is known of one capability on one release.

    Attributes:
        outcome: One of `OUTCOMES`.
        reason: Of all but "yes".
    """

    outcome: str
    reason: str = ""


def run_tests(report: Path) -> None:
    """Run the marked tests; those that fail are found in the report."""
    command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "--rootdir=.", "-q"]
    command += ["-m", PROPERTY, f"--junit-xml={report}", "tests/integration"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status > 1:
        raise LowbitError(f"pytest could not run the tests (exit status {status}): see above")


def read_report(report: Path) -> tuple[dict[tuple[str, str], Cell], str]:
    """The cells of a JUnit report by (capability, release), and what "main" was there."""
    try:
        root = ElementTree.parse(report).getroot()
    except ElementTree.ParseError as error:
        raise LowbitError(f"{report} is not a JUnit report ({error})") from None
    cells: dict[tuple[str, str], Cell] = {}
    # File by file, of which two workers' are mixed in a report: "path.of.file.TestClass".
    files = sorted(root.iter("testcase"), key=lambda c: c.attrib["classname"].partition(".Test")[0])
    for case in files:
        for mark in (p for p in case.iter("property") if p.get("name") == PROPERTY):
            capability, release = mark.attrib["value"].split(SEPARATOR)
            key, cell = (capability, release), cell_of(case)
            cells[key] = min(cells.get(key, cell), cell, key=lambda c: OUTCOMES.index(c.outcome))
    if not cells:
        raise LowbitError(f"{report} has no test with the mark {PROPERTY!r}")
    main = root.find(".//property[@name='main']")
    return cells, "" if main is None else main.attrib["value"]


def cell_of(case: ElementTree.Element) -> Cell:
    """The outcome of one test: an expected failure is a "no" with a known reason."""
    if case.find("failure") is not None or case.find("error") is not None:
        return Cell("failed", f"{case.get('name')} fails")
    skipped = case.find("skipped")
    if skipped is None:
        return Cell("yes")
    outcome = "no" if skipped.get("type") == "pytest.xfail" else "not run"
    return Cell(outcome, skipped.attrib["message"].removeprefix("Skipped: "))


def table(cells: dict[tuple[str, str], Cell], main: str) -> str:
    """The table in Markdown, its reasons as numbered notes below."""
    capabilities = dict.fromkeys(capability for capability, _ in cells)
    releases = sorted(dict.fromkeys(release for _, release in cells), key=_by_version)
    reasons: list[str] = []
    rows = []
    for capability in capabilities:
        found = [cells.get((capability, r), Cell("not run", NO_RESULT)) for r in releases]
        rows.append([capability, *(_text(cell, reasons) for cell in found)])
    lines = [markdown(["", *releases], rows)]
    if main:
        lines += ["", f"main: {main}."]
    for number, reason in enumerate(reasons, start=1):
        lines += ["", f"({number}) {reason}"]
    return "\n".join(lines)


def _by_version(release: str) -> tuple:
    """Releases in order, then names such as main."""
    numbers = [int(part) for part in re.findall(r"\d+", release)]
    return (not numbers, numbers, release)


def _text(cell: Cell, reasons: list[str]) -> str:
    if not cell.reason:
        return cell.outcome
    if cell.reason not in reasons:
        reasons.append(cell.reason)
    return f"{cell.outcome} ({reasons.index(cell.reason) + 1})"


def write(page: Path, text: str) -> None:
    """Put the table between the markers of `page`."""
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise LowbitError(f"{page} needs one line {BEGIN!r} and, below it, one {END!r}")
    before, rest = old.split(BEGIN)
    after = rest.split(END)[1]
    write_atomic(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = cli.described(__doc__)
    parser.add_argument("--results", type=Path, metavar="FILE", help="JUnit report of such a run")
    parser.add_argument(
        "--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}"
    )
    return parser.parse_args()


def main() -> None:
    """Run or read, then print and write."""
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        report = options.results or Path(directory) / "support.xml"
        if options.results is None:
            run_tests(report)
        cells, main_is = read_report(report)
    text = table(cells, main_is)
    print(text)
    failed = [cell.reason for cell in cells.values() if cell.outcome == "failed"]
    if failed:
        raise LowbitError(f"not written, since tests fail: {'; '.join(failed)}")
    if options.write:
        write(PAGE, text)


if __name__ == "__main__":
    cli.run(main)
