"""The sections of the page, in order: the headline, what was measured, where it comes from."""

import json
import re
from typing import Any

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.evaluation.evaluation_schema import Text
from megatron_lowbit.evaluation.report import page_tables, plot_layers, plot_quality, plot_tasks
from megatron_lowbit.evaluation.report.findings import BUDGET, PAPER, Comparison, Ratio, compare
from megatron_lowbit.evaluation.report.index_reader import (
    PointRanges,
    point_ranges,
    recipe_points,
)
from megatron_lowbit.evaluation.report.page import NOT_MEASURED, Block, Paragraph, Section
from megatron_lowbit.evaluation.report.results import ResultFile


def all_sections(index: CalibrationIndex, files: list[ResultFile], command: str) -> list[Section]:
    """The page; `command` makes it again."""
    manifest = index.manifest
    return [
        _headline(files, manifest),
        _section("quality", "Loss and KL against bits", _quality(files)),
        _section("tasks", "Tasks", _tasks(files)),
        _section("ranges", "Ranges of the features, by layer", _ranges(point_ranges(index))),
        _section("sqnr", "Quantization error, by sync point", _errors(files)),
        _section("long-context", "Long context", _long_context(files)),
        _section("generation", "Generation", _generation(files)),
        _section("recipe", "Recipe of the calibration index", _recipe(index)),
        _section("numbers", "All numbers", _numbers(files)),
        _section("origin", "Where this comes from", _origin(manifest, files, command)),
    ]


def _section(name: str, title: str, blocks: list[Block | None]) -> Section:
    there = [block for block in blocks if block is not None]
    return Section(name, title, there or [Paragraph(NOT_MEASURED)])


def _headline(files: list[ResultFile], manifest: dict[str, Any]) -> Section:
    """The section, warnings first."""
    blocks: list[Block] = _warnings(files, manifest)
    for file in files:
        found = compare(file.data)
        first, *others = _sentences(file, found)
        blocks += [Paragraph(file.label, "heading"), Paragraph(first, "lead")]
        blocks += [Paragraph(text) for text in (*others, _what(file))]
        if found:
            blocks.append(page_tables.comparison(file, found))
    note = (
        f"Best: the least KL at no more than {BUDGET:g} bits a value; beside it {PAPER}, by the "
        "same collective and within the same bits. Ratios under 1 are better than the paper's "
        "method. Their errors take the two as independent, though both ran on the same tokens. "
        "Loss: difference in negative log-likelihood to native BF16. On this page ± is one "
        f"standard error, and {page_tables.NONE} a number that is not in the file or not finite."
    )
    title = f"The best at no more than {BUDGET:g} bits a value"
    return Section("headline", title, [*blocks, Paragraph(note)])


def _warnings(files: list[ResultFile], manifest: dict[str, Any]) -> list[Block]:
    """What does not belong together."""
    texts = [
        f"{file.path.name} ({file.label}) was measured with another calibration index, "
        f"{file.data.index_sha256[:12]}, than the one that this page shows, "
        f"{manifest['sha256'][:12]}."
        for file in files
        if file.data.index_sha256 != manifest["sha256"]
    ]
    models = list(dict.fromkeys(file.data.model for file in files))
    if len(models) > 1:
        texts.append(f"The evaluations are of models of different names: {', '.join(models)}.")
    return [Paragraph(text, "warning") for text in texts]


def _what(file: ResultFile) -> str:
    texts = ", ".join(f"{text.name} ({text.tokens:,} tokens)" for text in file.data.texts)
    return (
        f"Model: {file.data.model}, {file.data.label} tensor parallelism. Texts: "
        f"{texts or 'none'}. File: {file.path.name} of {file.date:%Y-%m-%d %H:%M} UTC."
    )


def _sentences(file: ResultFile, found: list[Comparison]) -> list[str]:
    """One for each collective and its best codec, and one on tasks."""
    if not found:
        return [f"No codec at no more than {BUDGET:g} bits a value was measured on a text."]
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in found:
        groups.setdefault((one.variant.collective, one.variant.name), []).append(one)
    sentences = [_sentence(group) for group in groups.values()]
    return [*sentences, *_kept(file, [codec for _, codec in groups])]


def _sentence(group: list[Comparison]) -> str:
    variant, paper = group[0].variant, group[0].paper
    where = group[0].text.name if len(group) == 1 else f"{len(group)} texts"
    start = f"{variant.name} ({variant.bits_per_value:.2f} bits, {variant.collective})"
    if all(one.is_paper for one in group):
        return f"On {where} {start}, the paper's method, is the best."
    if paper is None or any(one.paper is None for one in group):
        return f"On {where} {start} is the best; {PAPER} was not measured by this collective."
    kl, loss = (_times([one.ratio(metric) for one in group]) for metric in ("kl", "delta_nll"))
    return f"On {where} {start} has {kl} the KL and {loss} the loss of {paper.variant}."


def _times(ratios: list[Ratio | None]) -> str:
    """``0.25x``, or ``0.25x to 0.27x`` over texts."""
    values = [one.value for one in ratios if one is not None]
    if len(values) < len(ratios):
        return "(no ratio: a value is not above zero)"
    ends = dict.fromkeys(f"{value:.2f}x" for value in (min(values), max(values)))
    return " to ".join(ends)


def _kept(file: ResultFile, codecs: list[str]) -> list[str]:
    average = file.data.task_average
    kept = {one.variant: one for one in average.results if one.kept is not None} if average else {}
    words = []
    for codec in dict.fromkeys([*codecs, PAPER]):
        if codec in kept:
            one = kept[codec]
            words.append(
                f"{codec} {page_tables.share(one.kept)}\u00a0% "
                f"[{page_tables.share(one.kept_low)}, {page_tables.share(one.kept_high)}]"
            )
    if not words:
        return []
    count = len(file.data.tasks)
    return [f"Kept of BF16's average over {count} tasks: {'; '.join(words)}."]


def _quality(files: list[ResultFile]) -> list[Block | None]:
    """A plot for each text, of all evaluations that have it."""
    panels: dict[tuple[str, str], list[tuple[ResultFile, Text]]] = {}
    for file in files:
        for text in file.data.texts:
            panels.setdefault((text.name, text.sha256), []).append((file, text))
    return [
        plot_quality.draw(_file_name(f"quality-{number}-{name}"), mine)
        for number, ((name, _), mine) in enumerate(panels.items(), 1)
    ]


def _tasks(files: list[ResultFile]) -> list[Block | None]:
    measured = [file for file in files if file.data.tasks]
    return [
        plot_tasks.draw_tasks("tasks", measured),
        *(page_tables.tasks(file) for file in measured),
        *(page_tables.task_differences(file) for file in measured),
    ]


def _ranges(points: list[PointRanges]) -> list[Block | None]:
    return [plot_layers.draw_ranges("ranges", points), page_tables.outliers(points)]


def _errors(files: list[ResultFile]) -> list[Block | None]:
    blocks: list[Block | None] = []
    for number, file in enumerate(files, 1):
        measured = file.data.sync_points
        if measured and measured.points:
            blocks.append(plot_layers.draw_sqnr(f"sqnr-{number}", file, measured))
            blocks.append(plot_layers.draw_stream(f"stream-{number}", file, measured))
            blocks.append(page_tables.errors(file, measured))
    return blocks


def _long_context(files: list[ResultFile]) -> list[Block | None]:
    blocks: list[Block | None] = []
    for number, file in enumerate(files, 1):
        for text, measured in enumerate(file.data.long_context, 1):
            name = f"long-context-{number}-{text}"
            blocks.append(plot_tasks.draw_long_context(name, file, measured))
            blocks.append(page_tables.needles(file, measured))
    return blocks


def _generation(files: list[ResultFile]) -> list[Block | None]:
    return [page_tables.generation(file, one) for file in files for one in file.data.generation]


def _recipe(index: CalibrationIndex) -> list[Block | None]:
    if points := recipe_points(index):
        return [plot_layers.draw_recipe("recipe", points), page_tables.recipe(points)]
    codec = index.manifest["codec"]
    return [
        Paragraph(
            "The calibration index has no recipe: it gives every sync point the same, "
            f"{codec['name']} at {codec['bits']} bits with {codec.get('bf16_features', 'unknown')} "
            "BF16 features."
        )
    ]


def _numbers(files: list[ResultFile]) -> list[Block | None]:
    return [page_tables.raw(file, text) for file in files for text in file.data.texts]


def _origin(manifest: dict[str, Any], files: list[ResultFile], command: str) -> list[Block | None]:
    shown = {k: v for k, v in manifest.items() if k not in ("layers", "recipe")}
    shown["model"] = {k: v for k, v in manifest["model"].items() if k != "fingerprints"}
    return [
        Paragraph("This page was made by:"),
        Paragraph(command, "code"),
        page_tables.files(files, manifest["sha256"]),
        Paragraph("Manifest of the calibration index, without its lists by layer:"),
        Paragraph(json.dumps(shown, indent=2), "code"),
    ]


def _file_name(text: str) -> str:
    """`text` with nothing in it that is awkward in the name of a file or in CSS."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", text)
