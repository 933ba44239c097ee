"""An evaluation's results for people, as Markdown tables."""

from collections.abc import Iterator

from megatron_lowbit.text_table import markdown


def tables(summary: dict) -> Iterator[str]:
    """A table with its title for each thing that was measured."""
    for text in summary["texts"]:
        yield _titled(summary, f"{text['tokens']} tokens of {text['name']}", _text(summary, text))
    if summary["tasks"]:
        what = "accuracy on zero-shot tasks in % ± standard error"
        yield _titled(summary, what, _tasks(summary))
    for one in summary["long_context"]:
        what = (
            f"{one['sequences']} sequences of {one['seq_length']} tokens of {one['name']}: KL in "
            f"nats a token by position, and how many of {one['needles']} needles are found"
        )
        yield _titled(summary, what, _long_context(one))
    for one in summary["generation"]:
        what = (
            f"{one['new_tokens']} tokens generated after each of {one['prompts']} prompts of "
            f"{one['prompt_length']} tokens of {one['name']}: how many are native's before the "
            "first other one"
        )
        yield _titled(summary, what, _generation(one))


def _titled(summary: dict, what: str, rows: list[list[str]]) -> str:
    size = f"TP {summary['tp_size']}" + (", simulated" if summary["simulated"] else "")
    head, *body = rows
    return f"{summary['model']}, {size}, {what}\n\n{markdown(head, body)}"


def _text(summary: dict, text: dict) -> list[list[str]]:
    """What the codecs do to the predictions on one text."""
    head = ["codec", "bits/value", "perplexity", "loss, nats", "KL, nats", "top-1", "bytes/token"]
    native = [f"{text['native']['perplexity']:.3f}", "0", "0", "100 %"]
    sent = f"{summary['native']['wire_bytes_per_token']:,.0f}"
    rows = [head, ["native BF16", "16.00", *native, sent]]
    for variant, result in zip(summary["variants"], text["results"], strict=True):
        rows.append(
            [
                result["variant"],
                f"{variant['bits_per_value']:.2f}",
                f"{result['perplexity']:.3f}",
                with_error(result["delta_nll"], result["delta_nll_stderr"]),
                with_error(result["kl"], result["kl_stderr"]),
                f"{100 * result['top1']:.1f} %",
                f"{variant['wire_bytes_per_token']:,.0f}",
            ]
        )
    return rows


def _tasks(summary: dict) -> list[list[str]]:
    """Each task by its own metric, their average, and the share of native's that is kept."""
    tasks, average = summary["tasks"], summary["task_average"]
    head = [f"{task['name']} ({task['metric']}, {task['items']} items)" for task in tasks]
    rows = [["codec", *head, "average", "kept of BF16, % [95 % interval]"]]
    native = [_percent_of(task["native"], task["metric"]) for task in tasks]
    rows.append(["native BF16", *native, _percent_of(average, "native"), "100"])
    for number, result in enumerate(average["results"]):
        own = [_percent_of(task["results"][number], task["metric"]) for task in tasks]
        rows.append([result["variant"], *own, _percent_of(result, "average"), _kept(result)])
    return rows


def _kept(result: dict) -> str:
    if result["kept"] is None:
        return "n/a"
    kept = f"{100 * result['kept']:.1f}"
    if result["kept_low"] is None:
        return kept
    return f"{kept} [{100 * result['kept_low']:.1f}, {100 * result['kept_high']:.1f}]"


def _long_context(measured: dict) -> list[list[str]]:
    """KL by bucket of positions, and needles."""
    buckets = [f"{first}-{end}" for first, end in measured["buckets"]]
    rows = [["codec", *buckets, "needles", "lost", "gained"]]
    found = round(measured["native"]["retrieved"] * measured["needles"])
    rows.append(["native BF16", *["0"] * len(buckets), str(found), "", ""])
    for result in measured["results"]:
        kl = [with_error(*one) for one in zip(result["kl"], result["kl_stderr"], strict=True)]
        found = round(result["retrieved"] * measured["needles"])
        counts = [found, result["lost"], result["gained"]]
        rows.append([result["variant"], *kl, *map(str, counts)])
    return rows


def _generation(measured: dict) -> list[list[str]]:
    rows = [["codec", "tokens, mean", "tokens, median", "prompts without any other, %"]]
    for result in measured["results"]:
        mean = with_error(result["mean_agreement"], result["mean_agreement_stderr"], digits=1)
        median = f"{result['median_agreement']:g}"
        rows.append([result["variant"], mean, median, _percent_of(result, "full_agreement")])
    return rows


def with_error(value: float, error: float | None, *, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def _percent_of(row: dict, key: str) -> str:
    """A share and its standard error, in percent."""
    error = row[f"{key}_stderr"]
    return with_error(100 * row[key], None if error is None else 100 * error, digits=1)
