"""tools/support_matrix.py: the table of integration/README.md from a JUnit report."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python

from megatron_lowbit.errors import LowbitError
from tools import support_matrix

ROOT = Path(__file__).resolve().parents[1]
# What the marks of tests/integration/conftest.py and pytest itself write.
CASES = """
import pytest

@pytest.mark.parametrize("release", ["main", "0.14.0", "0.16.1"])
@pytest.mark.support("local spec")
def test_local(release):
    if release == "main":
        pytest.skip("no checkout")

@pytest.mark.parametrize("any_name", ["0.16.1"])
@pytest.mark.support("engine")
class TestEngine:
    def test_one(self, any_name):
        pass

    def test_two(self, any_name):
        pytest.xfail("needs 0.19")

@pytest.mark.support("launcher", "main")
def test_launcher(record_property):
    record_property("main", "Megatron-LM 1.2.3")
    {broken}
"""
TABLE = """\
| | 0.14.0 | 0.16.1 | main |
| --- | --- | --- | --- |
| local spec | yes | yes | not run (1) |
| engine | not run (2) | no (3) | not run (2) |
| launcher | not run (2) | not run (2) | yes |

main: Megatron-LM 1.2.3.

(1) no checkout

(2) its tests have not been run on this release

(3) needs 0.19"""


def report(directory: Path, broken: str = "pass") -> Path:
    """A report of the cases above, by a real run of pytest under the project's conftest."""
    source = directory / "test_cases.py"
    source.write_text(CASES.replace("{broken}", broken))
    conftest = (ROOT / "tests" / "integration" / "conftest.py").read_text()
    (directory / "conftest.py").write_text(conftest)
    file = directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "tests" / "pytest.ini", "-q"]
    command += ["-p", "no:cacheprovider", f"--rootdir={directory}", f"--junit-xml={file}", source]
    path = f"{ROOT / 'tests' / 'integration'}"
    env = {"PYTHONPATH": f"{ROOT}:{path}", "PATH": "", "HOME": str(directory)}
    subprocess.run(command, env=env, capture_output=True, check=False, timeout=60)
    return file


def test_table(tmp_path):
    cells, main = support_matrix.read_report(report(tmp_path))
    assert re.sub("  +", " ", support_matrix.table(cells, main)) == TABLE


def test_a_failure_is_not_written(tmp_path):
    file = report(tmp_path, broken="assert False")
    done = python(ROOT / "tools" / "support_matrix.py", "--results", file, "--write")
    assert done.returncode == 1
    assert re.search(r"^\| launcher +\|( not run \(2\) \|){2} failed \(4\)", done.stdout, re.M)
    assert "not written, since tests fail: test_launcher fails" in done.stderr


def test_written_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{support_matrix.BEGIN}\nold\n{support_matrix.END}\nb\n")
    for _ in range(2):
        support_matrix.write(readme, "new")
        text = f"a\n{support_matrix.BEGIN}\n\nnew\n\n{support_matrix.END}\nb\n"
        assert readme.read_text() == text


def test_the_page_has_room_for_the_table(tmp_path):
    page = tmp_path / "README.md"
    page.write_bytes(support_matrix.PAGE.read_bytes())
    support_matrix.write(page, TABLE)
    assert TABLE in page.read_text()


def test_what_is_refused(tmp_path):
    for text, message in (("x", "not a JUnit report"), ("<testsuites/>", "no test with the mark")):
        (tmp_path / "report.xml").write_text(text)
        with pytest.raises(LowbitError, match=message):
            support_matrix.read_report(tmp_path / "report.xml")
    (tmp_path / "README.md").write_text(f"{support_matrix.END}")
    with pytest.raises(LowbitError, match="README.md needs one line"):
        support_matrix.write(tmp_path / "README.md", "new")
