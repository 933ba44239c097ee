"""The sections of the page below its headline, in order."""

import json
import re
from typing import Any

from megatron_lowbit.evaluation.report import (
    plot_layers,
    plot_long_context,
    plot_quality,
    plot_tasks,
    tables,
)
from megatron_lowbit.evaluation.report.blocks import (
    NOT_MEASURED,
    Block,
    Folded,
    Paragraph,
    Section,
)
from megatron_lowbit.evaluation.report.headline import headline
from megatron_lowbit.evaluation.report.ranges import PointRanges
from megatron_lowbit.evaluation.report.recipe import read_recipe
from megatron_lowbit.evaluation.report.results import ResultFile, Text


def all_sections(
    manifest: dict[str, Any], points: list[PointRanges], files: list[ResultFile], command: str
) -> list[Section]:
    """The page.

    Args:
        manifest: Of the index.
        points: The ranges of its sync points.
        files: The evaluations.
        command: That makes this page again.
    """
    return [
        headline(files, manifest),
        _section("quality", "Loss and KL against bits", _quality(files)),
        _section("tasks", "Tasks", _tasks(files)),
        _section("ranges", "Ranges of the features, by layer", _ranges(points)),
        _section("sqnr", "Quantization error, by sync point", _errors(files)),
        _section("long-context", "Long context", _long_context(files)),
        _section("generation", "Generation", _generation(files)),
        _section("recipe", "Recipe of the index", _recipe(manifest)),
        _section("numbers", "All numbers", _numbers(files)),
        _section("origin", "Where this comes from", _origin(manifest, files, command)),
    ]


def _section(name: str, title: str, blocks: list[Block | None]) -> Section:
    blocks = [block for block in blocks if block is not None]
    return Section(name, title, blocks or [Paragraph(NOT_MEASURED)])


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
        plot_tasks.draw("tasks", measured),
        *(tables.tasks(file) for file in measured),
        *(Folded(tables.task_differences(file)) for file in measured),
    ]


def _ranges(points: list[PointRanges]) -> list[Block | None]:
    return [plot_layers.draw_ranges("ranges", points), tables.outliers(points)]


def _errors(files: list[ResultFile]) -> list[Block | None]:
    blocks: list[Block | None] = []
    for number, file in enumerate(files, 1):
        if file.data.sync_points and file.data.sync_points.points:
            blocks.append(plot_layers.draw_sqnr(f"sqnr-{number}", file))
            blocks.append(tables.errors(file))
    return blocks


def _long_context(files: list[ResultFile]) -> list[Block | None]:
    blocks: list[Block | None] = []
    for number, file in enumerate(files, 1):
        for text, measured in enumerate(file.data.long_context, 1):
            name = f"long-context-{number}-{text}"
            blocks.append(plot_long_context.draw(name, file, measured))
            blocks.append(tables.needles(file, measured))
    return blocks


def _generation(files: list[ResultFile]) -> list[Block | None]:
    return [tables.generation(file, one) for file in files for one in file.data.generation]


def _recipe(manifest: dict[str, Any]) -> list[Block | None]:
    points = read_recipe(manifest)
    if points:
        return [plot_layers.draw_recipe("recipe", points), Folded(tables.recipe(points))]
    codec = manifest["codec"]
    return [
        Paragraph(
            "The index has no recipe: it gives every sync point the same, "
            f"{codec['name']} at {codec['bits']} bits with {codec.get('bf16_features', 'unknown')} "
            "BF16 features."
        )
    ]


def _numbers(files: list[ResultFile]) -> list[Block | None]:
    return [tables.raw(file, text) for file in files for text in file.data.texts]


def _origin(manifest: dict[str, Any], files: list[ResultFile], command: str) -> list[Block | None]:
    shown = {k: v for k, v in manifest.items() if k not in ("layers", "recipe")}
    shown["model"] = {k: v for k, v in manifest["model"].items() if k != "fingerprints"}
    return [
        Paragraph("This page was made by:"),
        Paragraph(command, "code"),
        tables.files(files, manifest["sha256"]),
        Paragraph("Manifest of the index, without its lists by layer:"),
        Paragraph(json.dumps(shown, indent=2), "code"),
    ]


def _file_name(text: str) -> str:
    """`text` with nothing in it that is awkward in the name of a file or in CSS."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", text)
