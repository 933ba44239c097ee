"""The report: what the page says, that it stands alone, and what is refused."""

import errno
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_sample as sample
from json_places import changed
from processes import python

from megatron_lowbit.calibration.index_files import read_index, write_index
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation import report

for _package in ("jinja2", "matplotlib", "pydantic"):
    pytest.importorskip(_package)

from megatron_lowbit.evaluation.report import page, style  # noqa: E402
from megatron_lowbit.evaluation.report.findings import codec_errors, compare  # noqa: E402
from megatron_lowbit.evaluation.report.index_reader import most_extreme, point_ranges  # noqa: E402
from megatron_lowbit.evaluation.report.results import read_results  # noqa: E402
from megatron_lowbit.evaluation.report.sections import all_sections  # noqa: E402

pytestmark = pytest.mark.slow  # whole pages, with all drawings
ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "report.py"
SECTIONS = "headline quality tasks ranges sqnr long-context generation recipe numbers origin"
FEW = {"bf16", "static-hybrid", "rotated-hybrid"}
_VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What is in a page: its tags, ids, text outside of drawings, and references."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.words, self.references = [], [], [], []
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self._take(tag, dict(attributes))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._take(tag, dict(attributes))

    def _take(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.ids += [attributes["id"]] if "id" in attributes else []
        loaded = ("src", "href", "xlink:href", "data", "srcset", "action", "poster")
        self.references += [attributes[name] for name in loaded if name in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def _faults(made: Page) -> list[str]:
    """Words that only a fault would put on a page."""
    return re.findall(r"Not measured\.|\bNone\b|\bnan\b|\binf\b|Undefined", made.text)


def _few(**changes) -> dict:
    """A small evaluation, quick to draw."""
    content = sample.keep_codecs(sample.evaluation(layers=4), FEW)
    return content | {"texts": content["texts"][:1]} | changes


EMPTY = {"texts": [], "tasks": [], "task_average": None, "long_context": [], "generation": []}


def _texts_only() -> dict:
    """Less still: for tests of what is said of texts."""
    return _few(**EMPTY | {"texts": _few()["texts"], "sync_points": None})


def _page(tmp_path: Path, *contents: dict, **manifest) -> Page:
    files = [sample.write(one, tmp_path / f"{i}.json") for i, one in enumerate(contents)]
    index = sample.index(layers=4, **manifest)
    index.manifest.setdefault("sha256", "0" * 64)
    sections = all_sections(index, read_results(files), "the command")
    return Page(page.render("a title", sections))


def _tool(index: Path, results: list[Path], into: Path) -> subprocess.CompletedProcess:
    return python(TOOL, "--index", index, "--results", *results, "--output", into / "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, Path]:
    """A report with everything in it, made by the tool."""
    directory = tmp_path_factory.mktemp("report")
    points = {
        str(layer): {
            kind: {
                "codec": "rotated-hybrid",
                "bits": [3, 5] if layer == 3 else 4 - layer % 2,
                "bf16_features": layer,
            }
            for kind in sample.KINDS
        }
        for layer in range(1, 7)
    }
    option = {"choice": {"codec": "rotated-hybrid", "bits": 4}, "bits_per_value": 4.1}
    recipe = {"points": points, "options": [option]}
    write_index(sample.index(layers=6, recipe=recipe), directory / "lowbit")
    digest = read_index(directory / "lowbit").manifest["sha256"]
    one = sample.write(sample.evaluation(layers=6, index_sha256=digest), directory / "a.json")
    other = sample.evaluation(layers=6, seed=1, tp_size=8, simulated=True)
    two = sample.write(other, directory / "b.json")
    done = _tool(directory / "lowbit", [one, two], directory / "out")
    assert (done.returncode, done.stderr) == (0, "")
    return (directory / "out" / "report.html").read_text(), directory


def test_page_stands_alone(whole):
    text, _ = whole
    made = Page(text)
    assert all(reference.startswith("#") for reference in made.references), made.references
    assert set(made.references) <= {f"#{name}" for name in made.ids}
    assert len(made.ids) == len(set(made.ids))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "script" not in made.count and "@import" not in text
    named = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert named <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, named


def test_page_has_each_section_and_plot(whole):
    text, directory = whole
    made = Page(text)
    assert [name for name in made.ids if name in SECTIONS.split()] == SECTIONS.split()
    assert _faults(made) == []
    pngs = sorted((directory / "out" / "report_plots").iterdir())
    assert len(pngs) == made.count["figure"] == 9
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in pngs)
    assert all(f'id="{png.stem}-' in text for png in pngs)


def test_drawings_follow_the_colours_of_the_page(whole):
    drawings = "".join(re.findall(r"<svg.*?</svg>", whole[0], flags=re.DOTALL))
    fixed = set(re.findall(r"#[0-9a-f]{6}\b", drawings))
    assert fixed == set(), f"colours that a dark page cannot change: {fixed}"
    assert "var(--ink)" in drawings and "var(--family-rotated-hybrid)" in drawings


def test_files_of_another_index_are_named(whole):
    text = Page(whole[0]).text
    assert "b.json (TP 8, simulated) was measured with another calibration index" in text
    assert "a.json (TP 3, real) was measured with another calibration index" not in text
    assert len(re.findall("ANOTHER ONE", text)) == 1


def test_recipe_in_runs_and_manifest_without_lists(whole):
    text = Page(whole[0]).text
    assert "The recipe in full." in text
    assert "3+5" in text and "Hollow: the bits of sums in two-shot" in text
    assert "emma.txt" in text and "2.13.0" in text
    assert "secret" not in text  # the fingerprints


def _set(content: dict, codec: str, **values) -> None:
    for result in content["texts"][0]["results"]:
        if result["variant"] == codec:
            result.update(values)


def test_headline_is_the_ratio_of_the_given_numbers(tmp_path):
    content = _few(task_average=None)
    _set(content, "rotated-hybrid", kl=0.06, kl_stderr=0.006, delta_nll=0.04)
    _set(content, "static-hybrid", kl=0.24, kl_stderr=0.0, delta_nll=0.2)
    text = _page(tmp_path, content).text
    assert (
        "On persuasion.txt rotated-hybrid (4.14 bits, one-shot) has 0.25x the KL and 0.20x the "
        "loss of static-hybrid." in text
    )
    (comparison,) = compare(read_results([tmp_path / "0.json"])[0].data)
    assert comparison.ratio("kl").stderr == pytest.approx(0.025)


def test_headline_says_so_when_the_paper_wins(tmp_path):
    content = _texts_only()
    _set(content, "rotated-hybrid", kl=0.9)
    text = _page(tmp_path, content).text
    assert "static-hybrid (4.19 bits, one-shot), the paper's method, is the best." in text


def test_headline_without_a_ratio(tmp_path):
    content = _texts_only()
    _set(content, "rotated-hybrid", delta_nll=-0.01)
    assert "(no ratio: a value is not above zero) the loss" in _page(tmp_path, content).text


def test_headline_without_the_paper_or_anything(tmp_path):
    alone = sample.keep_codecs(_texts_only(), {"rotated-hybrid"})
    assert "is the best; static-hybrid was not measured" in _page(tmp_path, alone).text
    carried = json.dumps(sample.keep_codecs(_texts_only(), {"rotated-hybrid", "static-hybrid"}))
    carried = json.loads(carried.replace('"static-hybrid"', '"static-hybrid@feedback"'))
    assert "is the best; static-hybrid was not measured" in _page(tmp_path, carried).text
    nothing = _page(tmp_path, sample.keep_codecs(_texts_only(), {"bf16"})).text
    assert "No codec at no more than 4.2 bits a value was measured" in nothing


def test_codecs_above_the_budget_cannot_win(tmp_path):
    content = _few()
    for variant in content["variants"]:
        if variant["variant"] == "rotated-hybrid":
            variant["bits_per_value"] = 4.25
    (comparison,) = compare(read_results([sample.write(content, tmp_path / "0.json")])[0].data)
    assert comparison.result.variant == "static-hybrid"


@pytest.mark.parametrize("sync_points", [None, {"sequences": 0, "points": []}])
def test_what_was_not_measured_is_said_and_not_drawn(tmp_path, sync_points):
    made = _page(tmp_path, _few(**EMPTY, sync_points=sync_points))
    # quality, tasks, sqnr, long context, generation, numbers
    assert made.text.count("Not measured.") == 6
    assert made.count["figure"] == 1  # the ranges, which are the index's
    assert "The calibration index has no recipe: it gives every sync point the same" in made.text


def test_numbers_that_are_not_finite(tmp_path):
    made = _page(tmp_path, sample.without_numbers(_few()))
    assert made.text.count("n/a") > 20
    assert set(_faults(made)) <= {"Not measured."}
    path = sample.write(_few(), tmp_path / "nan.json")
    path.write_text(path.read_text().replace('"perplexity": 46.1}', '"perplexity": NaN}'))
    assert read_results([path])[0].data.texts[0].native.perplexity is None


def test_some_numbers_that_are_not_finite(tmp_path):
    content = _few()
    _set(content, "rotated-hybrid", kl=None, kl_stderr=None)
    _set(content, "static-hybrid", delta_nll=-0.5)
    content["sync_points"]["points"][0]["sqnr"]["rotated-hybrid"] = None
    content["long_context"][0]["results"][0]["kl"][2] = None
    text = _page(tmp_path, content).text
    assert "Not on a log axis: static-hybrid (loss -0.5000), rotated-hybrid (KL not finite)" in text
    assert "1 not finite" in text


def test_sync_points_that_stand_out_are_named(tmp_path):
    content = _few()
    measured = read_results([sample.write(content, tmp_path / "0.json")])[0].data.sync_points
    errors = {error.codec: error for error in codec_errors(measured)}
    found = [(point.layer, point.name) for point in errors["static-hybrid"].extreme]
    assert (2, "mlp.linear_fc2") in found
    assert errors["rotated-hybrid"].extreme == []
    value = errors["static-hybrid"].worst.sqnr["static-hybrid"]
    assert f"{value:.1f} dB: layer 2 mlp.linear_fc2" in _page(tmp_path, content).text


def test_outliers_by_their_multiple_of_the_median():
    index = sample.index(layers=3)
    record = index.layers[2]["mlp.linear_fc2"]
    record.maximum[:, 7] = 500.0
    (first,) = most_extreme(point_ranges(index), 1)
    feature, widest, times = first.outlier
    assert (first.layer, first.name, feature, widest) == (2, "mlp.linear_fc2", 7, 3000.0)
    assert times == pytest.approx(first.left)  # feature 7 is not in the BF16 index


@pytest.mark.parametrize("name", [r"$\bad{$", "$x$", "a$b", r"\frac{1}", "<b>&amp;", "日本 🙂"])
def test_names_are_plain_text(tmp_path, name):
    def named(text):
        return f"static-hybrid {name}" if text == "static-hybrid" else text

    content = changed(_few(model=name), value=named, key=named)
    content["texts"][0]["name"] = content["long_context"][0]["name"] = name
    content["sync_points"]["points"][0]["name"] = name
    assert name in " ".join(_page(tmp_path, content).words)


def test_numbers_near_the_end_of_doubles_are_drawn(tmp_path):
    def huge(value):
        return value * 1e308 / max(abs(value), 1e-9) if isinstance(value, float) else value

    content = changed(_few(), value=huge)
    assert set(_faults(_page(tmp_path, content))) <= {"Not measured."}
    large = json.loads(json.dumps(content).replace("e+308", "e+29"))
    assert set(_faults(_page(tmp_path, large))) <= {"Not measured."}


def _sections(name: str = "one", data: bytes = b"new") -> list:
    plot = style.Plot(name=name, caption="a plot", svg="<svg></svg>", png=b"\x89PNG " + data)
    return [page.Section("headline", "A section", [plot])]


@pytest.mark.parametrize("fails", ["plot", "page"])
def test_a_failure_leaves_the_old_report(tmp_path, monkeypatch, fails):
    """Whole: nothing of it is new where its page cannot be written."""
    output = tmp_path / "report.html"
    page.write_report("old", _sections(), output)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = page.write

    def full(path, data):
        if fails == ("plot" if path.suffix == ".png" else "page"):
            path.write_bytes(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(page, "write", full)
    with pytest.raises(OSError, match="No space left"):
        page.write_report("new", _sections("two", b"newer"), output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_name_that_is_no_unicode_is_shown_as_escapes(tmp_path):
    output = tmp_path / "report.html"
    page.write_report("of a\udcff.json", _sections(), output)
    assert "of a\\udcff.json" in output.read_text()


def test_a_lone_surrogate_leaves_nothing(tmp_path):
    write_index(sample.index(layers=2), tmp_path / "lowbit")
    sample.write(_texts_only() | {"model": "a\ud800"}, tmp_path / "a.json")
    done = _tool(tmp_path / "lowbit", [tmp_path / "a.json"], tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "lone surrogate" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_places_that_are_refused(tmp_path):
    with pytest.raises(LowbitError, match=r"report\.pdf is not the name of an \.html file"):
        page.check_destination(tmp_path / "report.pdf")
    (tmp_path / "report_plots").mkdir()
    (tmp_path / "report_plots" / "thesis.tex").touch()
    with pytest.raises(LowbitError, match="report_plots, where the plots go, holds other things"):
        page.check_destination(tmp_path / "report.html")


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(LowbitError, match=r"the report needs jinja2: pip install .*\[report\]"):
        report.require()


def test_tool_fails_in_one_line(tmp_path):
    write_index(sample.index(layers=2), tmp_path / "lowbit")
    (tmp_path / "a.json").write_text("{}")
    done = _tool(tmp_path / "lowbit", [tmp_path / "a.json"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"report.py: error: {tmp_path / 'a.json'}: format is null, this release reads 2 and 3: "
        "write the file again with python -m megatron_lowbit evaluate"
    ]
    assert not (tmp_path / "report.html").exists()
