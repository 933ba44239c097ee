"""The evaluation loop: measures x units, each natively first and then through every variant.

Only scores are kept of a run, and of a native run what the variants of the same unit are compared
with. The loop knows nothing of Megatron: a `Variant` says how to switch itself on and off.
Data-parallel ranks share the units; the results are the same for any number of them, and for an
evaluation that was interrupted and went on (`evaluation.journal`). The stages of a pipeline run the
same units, and add up what each of them sent.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch.distributed as dist

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.traffic import Counters, Traffic
from megatron_lowbit.evaluation.journal import Entry, Journal
from megatron_lowbit.evaluation.measures.measure import NATIVE, Measure, Record
from megatron_lowbit.model.language_model import LanguageModel

_ADDED = ("values", "payload_bytes", "sent_bytes")  # over sync points, which all see all tokens
_COUNTED = ("tokens", *_ADDED)


@dataclass(frozen=True)
class Variant:
    """A way to communicate.

    Attributes:
        name: As in the results.
        active: Makes a context in which the model communicates this way.
        traffic: The counters of its sync points on this stage, of which each sees every token.
    """

    name: str
    active: Callable[[], AbstractContextManager]
    traffic: list[Traffic]


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        summaries: Measure -> its results.
        traffic: Variant -> what it sent in all units, through all sync points together; `tokens`
            are those of one sync point.
    """

    summaries: dict[str, dict]
    traffic: dict[str, Counters]


def evaluate(
    measures: Sequence[Measure],
    model: LanguageModel,
    variants: list[Variant],
    *,
    journal: Journal | None,
    done: Iterable[Entry] = (),
    dp_group: dist.ProcessGroup | None,
    track: Callable[[str, str], Callable[[Iterable[int]], Iterable[int]]],
) -> Evaluation:
    """Run all measures; call it on every rank.

    Args:
        measures: What to measure, their names unique.
        model: What to measure it on.
        variants: What to compare with native communication.
        journal: Where finished units are noted, its `start` behind it; None keeps none.
        done: Units that were finished before.
        dp_group: The ranks that share the units.
        track: (measure, unit's name) -> wraps the loop over units, for a progress bar.

    Returns:
        The results, the same on every rank.
    """
    finished = {(entry.measure, entry.unit): entry for entry in done}
    rank, ranks = dist.get_rank(dp_group), dist.get_world_size(dp_group)
    mine: dict[tuple[str, int], Entry] = {}
    for measure in measures:
        todo = [n for n in range(len(measure)) if (measure.name, n) not in finished]
        for number in track(measure.name, measure.unit)(todo[rank::ranks]):
            entry = _run_unit(measure, number, model, variants)
            mine[measure.name, number] = entry
            if journal:
                journal.add(entry)
    everything = finished
    for part in gather_values(mine, group=dp_group):
        everything |= part
    summaries = {
        measure.name: measure.summarize(
            [everything[measure.name, number].record for number in range(len(measure))]
        )
        for measure in measures
    }
    return Evaluation(summaries, _traffic(everything.values(), variants))


def _run_unit(
    measure: Measure, number: int, model: LanguageModel, variants: list[Variant]
) -> Entry:
    """Run one unit natively and through all variants; the same on every stage."""
    scores, native = measure.run(number, model, None)
    record: Record = {NATIVE: scores}
    traffic: dict[str, dict[str, int]] = {}
    for variant in variants:
        before = _counted(variant.traffic)
        with variant.active():
            record[variant.name], _ = measure.run(number, model, native)
        after = _counted(variant.traffic)
        traffic[variant.name] = {key: after[key] - before[key] for key in _COUNTED}
    of_stages = model.stages.gather((record, traffic))
    record, traffic = of_stages[0]
    for _, more in of_stages[1:]:
        for name, counted in more.items():
            traffic[name] |= {key: traffic[name][key] + counted[key] for key in _ADDED}
    # By way of JSON, so that an entry is the same whether it comes from here or from a journal.
    entry = Entry(measure=measure.name, unit=number, record=record, traffic=traffic)
    return Entry.from_json(entry.to_json())


def _counted(traffic: list[Traffic]) -> dict[str, int]:
    """The sum over sync points; times are left out, they are never the same twice."""
    total = Counters()
    for one in traffic:
        total.add(one.total())
    total.tokens = traffic[0].total().tokens
    return {key: getattr(total, key) for key in _COUNTED}


def _traffic(entries: Iterable[Entry], variants: list[Variant]) -> dict[str, Counters]:
    totals = {variant.name: Counters() for variant in variants}
    for entry in entries:
        for name, counted in entry.traffic.items():
            totals[name].add(Counters(**counted))
    return totals
