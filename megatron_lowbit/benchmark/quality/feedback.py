"""What error feedback is to reach, measured by tools/bench_quality.py --feedback.

The steps are those of `benchmark.quality.quality`, with other variants: everything with and without
feedback in the same run. Where a target is measured on several texts, each is shown, and the worst
of them counts.
"""

from collections.abc import Callable

from megatron_lowbit.benchmark.quality.quality import KINDS, Step
from megatron_lowbit.benchmark.quality.quality_report import reached, with_qualities

PAPER, TODAY, OURS = "static-hybrid", "recipe", "recipe@feedback"
TWO_SHOT = f"{OURS}@two-shot"
_FEWER = "recipe-3.1@feedback"
_TP3 = (
    *(PAPER, TODAY, OURS, TWO_SHOT, "recipe-1.7@feedback", "recipe-2.1@feedback@two-shot"),
    *(_FEWER, "shaped-hybrid@feedback", "recipe-6@feedback"),
    f"{PAPER}@feedback",
)
_TP8 = (PAPER, OURS, TWO_SHOT, "recipe-1.7@feedback", "recipe-2.3@feedback@two-shot")
_PEERS = tuple(
    name + way for name in ("int4-g32", "nvfp4", "fp8-g256") for way in ("", "@feedback")
)
_BOTH = (TODAY, OURS)
_SKIPPED, _SKIPPING_BUDGET = 10, "3.5"  # over all 60 sync points: 4.2 bits for the 50 that send


def steps(tokens: int, limit: int) -> list[Step]:
    """What is measured: `tokens` of each text, `limit` items of each task."""
    length, prose = ("--tokens", str(tokens)), ("prose",)
    return [
        Step("feedback-tp3", 3, _TP3, KINDS, length),
        Step("feedback-tp8", 8, _TP8, KINDS, length),
        Step(
            *("feedback-skip", 3, (PAPER, OURS), KINDS, length),
            skipped=_SKIPPED,
            budget=_SKIPPING_BUDGET,
        ),
        Step("feedback-peers", 3, _PEERS, prose, ("--tokens", "2048")),
        Step("feedback-top1", 3, _BOTH, prose, ("--tokens", "20480")),
        Step("feedback-long", 3, _BOTH, prose, ("--tokens", "512", "--long-context", "4096")),
        Step("feedback-tasks", 3, _BOTH, (), ("--tasks", "all", "--limit", str(limit))),
    ]


def text(results: dict[str, dict]) -> str:
    """The targets and all that was measured, as Markdown; steps without results are left out."""
    steps = ("feedback-tp3", "feedback-tp8", "feedback-skip", "feedback-peers")
    return with_qualities(targets(results), results, steps)


def targets(results: dict[str, dict]) -> list[list[str]]:
    """Rows of the table of targets: measure, goal, measured, whether it was reached."""
    rows = []
    for name, ranks, matching in (("feedback-tp3", 3, "2.1"), ("feedback-tp8", 8, "2.3")):
        if name in results:
            rows += _divergences(results[name], ranks, matching)
    if "feedback-tp3" in results:
        rows += _against_today(results["feedback-tp3"])
    for name, make in _OTHERS.items():
        if name in results:
            rows += make(results[name])
    return rows


def _divergences(result: dict, ranks: int, matching: str) -> list[list[str]]:
    """KL against the paper's method at 4.19 bits, one-shot."""
    two_shot, at = f"recipe-{matching}@feedback@two-shot", f"TP {ranks}"
    return [
        _row(f"{at}: KL at 4.2 bits, times less than {PAPER}'s", result, OURS, PAPER, 30),
        _row(f"{at}: the same, two-shot", result, TWO_SHOT, PAPER, 15),
        _row(f"{at}: KL at 1.7 bits, times less", result, "recipe-1.7@feedback", PAPER, 1),
        _row(f"{at}: KL at {matching} bits, two-shot, times less", result, two_shot, PAPER, 1),
    ]


def _against_today(result: dict) -> list[list[str]]:
    kl = {name: by["recipe-6@feedback"] for name, by in _by_text(result, "kl").items()}
    return [
        _row("TP 3: KL at 3.1 bits, times less than recipe's", result, _FEWER, TODAY, 1),
        _cells("TP 3: KL at 6 bits", "0.0025 or less", kl, max(kl.values()) <= 0.0025, "{:.4f}"),
    ]


def _row(work: str, result: dict, ours: str, other: str, asked: float) -> list[str]:
    """How many times less KL `ours` has than `other`."""
    times = {name: by[other] / by[ours] for name, by in _by_text(result, "kl").items()}
    return _cells(work, f"{asked:g}", times, min(times.values()) >= asked, "{:.2f}")


def _cells(work: str, asked: str, by_text: dict[str, float], met: bool, how: str) -> list[str]:
    each = ", ".join(f"{name} {how.format(value)}" for name, value in by_text.items())
    return [work, asked, each, reached(met)]


def _by_text(result: dict, key: str) -> dict[str, dict[str, float]]:
    """Text -> variant -> its figure."""
    return {
        text["name"].partition("_")[0].removesuffix(".txt"): {
            found["variant"]: found[key] for found in text["results"]
        }
        for text in result["texts"]
    }


def _top1(result: dict) -> list[list[str]]:
    (by_variant,) = _by_text(result, "top1").values()
    shares = {name: by_variant[name] for name in _BOTH}
    met = shares[OURS] >= 0.94
    return [_cells("top-1 as native, 20,480 tokens of prose", "94 %", shares, met, "{:.1%}")]


def _skip(result: dict) -> list[list[str]]:
    work = f"TP 3: KL with {_SKIPPED} of 60 sync points skipped, 4.2 bits elsewhere, times less"
    return [_row(f"{work} than {PAPER}'s", result, OURS, PAPER, 1)]


def _long(result: dict) -> list[list[str]]:
    (needles,) = (one for one in result["long_context"] if one["needles"])
    missing = {one["variant"]: abs(one["delta_log_likelihood"]) for one in needles["results"]}
    met = missing[OURS] <= missing[TODAY] / 3
    work = f"log-probability of {needles['needles']} planted facts, off native's by, nats"
    return [_cells(work, f"a third of {TODAY}'s", missing, met, "{:.3f}")]


def _tasks(result: dict) -> list[list[str]]:
    flips = {
        name: sum(
            task["items"] * (1 - one["same_choice"])
            for task in result["tasks"]
            for one in task["results"]
            if one["variant"] == name
        )
        for name in _BOTH
    }
    items = sum(task["items"] for task in result["tasks"])
    met = flips[OURS] <= flips[TODAY] / 2
    work = f"answers that flip against native, of {items}"
    return [_cells(work, f"half of {TODAY}'s", flips, met, "{:.0f}")]


_OTHERS: dict[str, Callable[[dict], list[list[str]]]] = {
    "feedback-skip": _skip,
    "feedback-top1": _top1,
    "feedback-long": _long,
    "feedback-tasks": _tasks,
}
