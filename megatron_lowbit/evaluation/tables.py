"""An evaluation's results for people, as Markdown tables."""


def text_table(summary: dict, text: dict) -> str:
    """What the codecs do to the predictions on one text.

    Args:
        summary: The whole JSON output.
        text: One of its ``texts``.
    """
    head = ["codec", "bits/value", "perplexity", "loss, nats", "KL, nats", "top-1", "bytes/token"]
    native = [f"{text['native']['perplexity']:.3f}", "0", "0", "100 %"]
    sent = f"{summary['native']['wire_bytes_per_token']:,.0f}"
    rows = [head, ["---"] * len(head), ["native BF16", "16.00", *native, sent]]
    for variant, result in zip(summary["variants"], text["results"], strict=True):
        rows.append(
            [
                result["codec"],
                f"{variant['bits_per_value']:.2f}",
                f"{result['perplexity']:.3f}",
                _with_error(result["delta_nll"], result["delta_nll_stderr"]),
                _with_error(result["kl"], result["kl_stderr"]),
                f"{100 * result['top1']:.1f} %",
                f"{variant['wire_bytes_per_token']:,.0f}",
            ]
        )
    size = f"TP {summary['tp_size']}" + (", simulated" if summary["simulated"] else "")
    title = f"{summary['model']}, {size}, {text['tokens']} tokens of {text['name']}"
    return f"{title}\n\n{_aligned(rows)}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
