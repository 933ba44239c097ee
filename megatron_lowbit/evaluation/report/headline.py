"""The top of the page: what was measured, and the best codec against the paper's method."""

from typing import Any

from megatron_lowbit.evaluation.report import tables
from megatron_lowbit.evaluation.report.blocks import Block, Paragraph, Section
from megatron_lowbit.evaluation.report.findings import BUDGET, PAPER, Comparison, Ratio, compare
from megatron_lowbit.evaluation.report.results import ResultFile


def headline(files: list[ResultFile], manifest: dict[str, Any]) -> Section:
    """The section, warnings first."""
    blocks = warnings(files, manifest)
    for file in files:
        found = compare(file.data)
        first, *others = _sentences(file, found)
        blocks += [Paragraph(file.label, "heading"), Paragraph(first, "lead")]
        blocks += [Paragraph(text) for text in (*others, _what(file))]
        if found:
            blocks.append(tables.comparison(file, found))
    note = (
        f"Best: the least KL at no more than {BUDGET:g} bits a value; beside it {PAPER}, by the "
        "same collective and within the same bits. Ratios under 1 are better than the paper's "
        "method. Their errors take the two as independent, though both ran on the same tokens. "
        "Loss: difference in negative log-likelihood to native BF16. On this page ± is one "
        f"standard error, and {tables.NONE} a number that is not in the file or not finite."
    )
    title = f"The best at no more than {BUDGET:g} bits a value"
    return Section("headline", title, [*blocks, Paragraph(note)])


def warnings(files: list[ResultFile], manifest: dict[str, Any]) -> list[Block]:
    """What does not belong together."""
    texts = [
        f"{file.path.name} ({file.label}) was measured with another index, "
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
        groups.setdefault((one.variant.collective, one.variant.codec), []).append(one)
    sentences = [_sentence(group) for group in groups.values()]
    return [*sentences, *_kept(file, [codec for _, codec in groups])]


def _sentence(group: list[Comparison]) -> str:
    variant = group[0].variant
    where = group[0].text.name if len(group) == 1 else f"{len(group)} texts"
    start = f"{variant.codec} ({variant.bits_per_value:.2f} bits, {variant.collective})"
    if all(one.is_paper for one in group):
        return f"On {where} {start}, the paper's method, is the best."
    if any(one.paper is None for one in group):
        return f"On {where} {start} is the best; {PAPER} was not measured by this collective."
    kl, loss = (_times([getattr(one, key) for one in group]) for key in ("kl_ratio", "loss_ratio"))
    return f"On {where} {start} has {kl} the KL and {loss} the loss of {group[0].paper.codec}."


def _times(ratios: list[Ratio | None]) -> str:
    """``0.25x``, or ``0.25x to 0.27x`` over texts."""
    if None in ratios:
        return "(no ratio: a value is not above zero)"
    least, most = min(one.value for one in ratios), max(one.value for one in ratios)
    ends = dict.fromkeys(f"{value:.2f}x" for value in (least, most))
    return " to ".join(ends)


def _kept(file: ResultFile, codecs: list[str]) -> list[str]:
    average = file.data.task_average
    kept = {one.codec: one for one in average.results if one.kept is not None} if average else {}
    words = []
    for codec in dict.fromkeys([*codecs, PAPER]):
        if codec in kept:
            one = kept[codec]
            words.append(
                f"{codec} {tables.share(one.kept)}\u00a0% "
                f"[{tables.share(one.kept_low)}, {tables.share(one.kept_high)}]"
            )
    if not words:
        return []
    count = len(file.data.tasks)
    return [f"Kept of BF16's average over {count} tasks: {'; '.join(words)}."]
