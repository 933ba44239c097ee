"""What tools/bench_quality.py prints: the targets with what came out, and all that was measured.

Where a target is measured on several texts or tensor-parallel sizes, the worst of them counts.
"""

import math
from collections.abc import Sequence

from megatron_lowbit.benchmark.quality.quality import BUDGET, OURS, OURS_TWO_SHOT, PAPER
from megatron_lowbit.codecs.peers.systems import PEERS
from megatron_lowbit.evaluation.text_tables import with_error
from megatron_lowbit.text_table import markdown


def text(results: dict[str, dict]) -> str:
    """All tables, as Markdown, of the results by step (`benchmark.quality.quality.run`)."""
    steps = ("tp3", "tp8", "tp3-peers", "tp3-candidates")
    tables = with_qualities(targets(results), results, steps)
    return f"{tables}\n\n{_tasks(results['tp3-tasks'])}"


def with_qualities(rows: list[list[str]], results: dict[str, dict], steps: Sequence[str]) -> str:
    """The table of targets, and behind it a table for each of `steps` that has results."""
    parts = [markdown(["measure", "goal", "measured", "reached"], rows)]
    for found in (results[name] for name in steps if name in results):
        parts.append(f"{title(found)}:\n\n{quality_table(found)}")
    return "\n\n".join(parts)


def targets(results: dict[str, dict]) -> list[list[str]]:
    """Rows of the table of targets: measure, goal, measured, whether it was reached."""
    both = [results["tp3"], results["tp8"]]
    matched = {
        f"TP {result['tp_size']} {text['name']}": _bits_to_match(result, text)
        for result in both
        for text in result["texts"]
    }
    behind = _behind_peers(results)
    rows = [
        _row(f"loss at {BUDGET} bits, of {PAPER}'s", 0.1, _shares(both, "delta_nll")),
        _row(f"KL at {BUDGET} bits, of {PAPER}'s", 1 / 6, _shares(both, "kl")),
        _row(f"bits that match {PAPER}'s loss at 4.19", 3.2, matched),
    ]
    kept = {r["variant"]: r for r in results["tp3-tasks"]["task_average"]["results"]}
    for name, asked in ((OURS, 0.995), (OURS_TWO_SHOT, 0.99)):
        found = kept[name]
        span = f"{found['kept_low']:.1%} to {found['kept_high']:.1%}"
        rows.append(
            [
                f"average of the five tasks kept, {name}",
                f"{asked:.1%}",
                f"{found['kept']:.1%} (95 %: {span})",
                reached(found["kept"] >= asked),
            ]
        )
    ahead = f"behind {', '.join(behind)}" if behind else "ahead of all"
    rows.append(["KL at equal bits, against every peer", "all", ahead, reached(not behind)])
    return rows


def _shares(results: list[dict], key: str) -> dict[str, float]:
    """Our recipe's figure as a share of the paper's, by TP size and text."""
    shares = {}
    for result in results:
        for text in result["texts"]:
            by_codec = {r["variant"]: r[key] for r in text["results"]}
            shares[f"TP {result['tp_size']} {text['name']}"] = by_codec[OURS] / by_codec[PAPER]
    return shares


def _bits_to_match(result: dict, text: dict) -> float:
    """The fewest bits of a recipe whose loss is not above the paper's; infinite if none is."""
    bits = {variant["variant"]: variant["bits_per_value"] for variant in result["variants"]}
    loss = {r["variant"]: r["delta_nll"] for r in text["results"]}
    recipes = [name for name in loss if name.startswith("recipe") and "@" not in name]
    matching = [bits[name] for name in recipes if loss[name] <= loss[PAPER]]
    return min(matching, default=math.inf)


def _behind_peers(results: dict[str, dict]) -> list[str]:
    """Peers that no variant of ours beats at no more bits, by the same collective."""
    variants = {v["variant"]: v for step in ("tp3", "tp3-peers") for v in results[step]["variants"]}
    behind = []
    for number, text in enumerate(results["tp3-peers"]["texts"]):
        kl = {
            r["variant"]: r["kl"]
            for step in ("tp3", "tp3-peers")
            for r in results[step]["texts"][number]["results"]
        }
        for name, variant in variants.items():
            if name.partition("@")[0] not in PEERS:
                continue
            rivals = [
                kl[ours]
                for ours, v in variants.items()
                if ours.startswith("recipe")
                and v["collective"] == variant["collective"]
                and v["bits_per_value"] <= variant["bits_per_value"] + 0.005
            ]
            if not rivals or min(rivals) >= kl[name]:
                behind.append(f"{name} on {text['name']}")
    return behind


def _row(work: str, asked: float, measured: dict[str, float]) -> list[str]:
    worst = max(measured.values())
    each = ", ".join(f"{name}: {value:.3f}" for name, value in measured.items())
    return [work, f"{asked:.3f} or less", f"{worst:.3f} ({each})", reached(worst <= asked)]


def quality_table(result: dict) -> str:
    """Loss and KL of every variant on every text."""
    names = [text["name"] for text in result["texts"]]
    head = ["variant", "collective", "bits/value"]
    head += [f"{what}, {name}" for name in names for what in ("loss", "KL")]
    rows = []
    for number, variant in enumerate(result["variants"]):
        row = [variant["variant"], variant["collective"], f"{variant['bits_per_value']:.2f}"]
        for text in result["texts"]:
            scores = text["results"][number]
            row += [with_error(scores["delta_nll"], scores["delta_nll_stderr"])]
            row += [with_error(scores["kl"], scores["kl_stderr"])]
        rows.append(row)
    return markdown(head, rows)


def _tasks(result: dict) -> str:
    """Accuracy of every variant on every task, and the average."""
    average = result["task_average"]
    head = ["variant", *(task["name"] for task in result["tasks"]), "average", "kept (95 %)"]
    native = [f"{task['native'][task['metric']]:.3f}" for task in result["tasks"]]
    rows = [["native", *native, f"{average['native']:.3f}", "100 %"]]
    for number, found in enumerate(average["results"]):
        scores = [task["results"][number][task["metric"]] for task in result["tasks"]]
        kept = f"{found['kept']:.1%} ({found['kept_low']:.1%} to {found['kept_high']:.1%})"
        cells = [f"{score:.3f}" for score in scores]
        rows.append([found["variant"], *cells, f"{found['average']:.3f}", kept])
    items = ", ".join(f"{task['name']} {task['items']}" for task in result["tasks"])
    return f"{title(result)}, items: {items}\n\n{markdown(head, rows)}"


def title(result: dict) -> str:
    """Model, tensor-parallel size and texts."""
    size = f"TP {result['tp_size']}" + (", simulated" if result["simulated"] else "")
    tokens = [f"{text['tokens']} tokens of {text['name']}" for text in result["texts"]]
    return ", ".join([result["model"], size, *tokens])


def reached(met: bool) -> str:
    """In the tables of targets."""
    return "yes" if met else "**no**"
