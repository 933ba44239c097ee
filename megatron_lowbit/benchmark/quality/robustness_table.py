"""The results of `benchmark.quality.robustness`: Markdown tables, and what explains them."""

from megatron_lowbit.text_table import markdown

NOTES = """\
What each codec takes from a calibration:
- static-hybrid: which features travel in BF16, and from each rank's ranges the scale of all others;
- rotated-hybrid: only which features travel in BF16 (of those, the column "same features" has the
  share that the first row has, too);
- shaped-hybrid: that, each rank's means, and the variances that even out the features;
- recipe: that, and from gradients and errors on the calibration text (its first 4,096 tokens at
  most) the bits and the number of BF16 features of every sync point."""
_COLUMNS = {"kl": "KL divergence", "delta_nll": "difference in loss"}


def tables(content: dict) -> str:
    """A table of KL divergence and one of the difference in loss."""
    texts = content["texts"]
    natively = ", ".join(f"{text['name']} {text['native']['perplexity']:.2f}" for text in texts)
    setting = (
        f"{content['model']}, TP {content['tp_size']}, simulated, {texts[0]['tokens']} held-out "
        f"tokens of each text, calibrated on sequences of {content['seq_length']} tokens"
    )
    parts = [f"{setting}; native perplexity: {natively}"]
    for key, what in _COLUMNS.items():
        parts.append(f"{what[0].upper()}{what[1:]} from native, nats a token, by held-out text:")
        parts.append(_table(content, key))
    return "\n\n".join(parts)


def _table(content: dict, key: str) -> str:
    first = content["calibrations"][0]["results"]
    columns = [(text, codec) for text, results in first.items() for codec in results]
    budgets = {"recipe": f" {content['budget']:g}"}
    heads = [f"{text}: {codec}{budgets.get(codec, '')}" for text, codec in columns]
    rows = []
    for row in content["calibrations"]:
        numbers = [f"{row['results'][text][codec][key]:.4f}" for text, codec in columns]
        calibrated = f"{row['kind']}, {row['sequences']} sequences, seed {row['seed']}"
        same = row["same_features"]
        rows.append([calibrated, "-" if same is None else f"{100 * same:.0f} %", *numbers])
    return markdown(["calibrated on", "same features", *heads], rows, left=1)
