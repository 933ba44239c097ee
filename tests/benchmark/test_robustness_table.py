"""The Markdown tables of the measurement of robustness."""

from megatron_lowbit.benchmark.quality.robustness_table import tables


def _content() -> dict:
    def result(kl: float) -> dict:
        return {"kl": kl, "delta_nll": -kl / 2}

    def row(kind: str, share: float | None, kl: float) -> dict:
        of_texts = {
            text: {"rotated-hybrid": result(kl + shift), "recipe": result(kl / 2 + shift)}
            for text, shift in (("prose", 0.0), ("code", 0.25))
        }
        return {
            "kind": kind,
            "sequences": 8,
            "seed": 3,
            "same_features": share,
            "results": of_texts,
        }

    return {
        "model": "M",
        "tp_size": 3,
        "seq_length": 128,
        "budget": 4.2,
        "texts": [
            {"name": "prose", "tokens": 1024, "native": {"perplexity": 12.3456}},
            {"name": "code", "tokens": 1024, "native": {"perplexity": 3.0}},
        ],
        "calibrations": [row("prose", 1.0, 0.5), row("bible", 0.625, 0.1), row("code", None, 1.0)],
    }


def test_a_row_a_calibration_and_a_column_a_text_and_codec():
    title, _, kl, _, loss = tables(_content()).split("\n\n")
    assert "M, TP 3, simulated, 1024 held-out tokens of each text" in title
    assert title.endswith("native perplexity: prose 12.35, code 3.00")
    head, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in kl.splitlines()
    ]
    assert head == [
        "calibrated on",
        "same features",
        "prose: rotated-hybrid",
        "prose: recipe 4.2",
        "code: rotated-hybrid",
        "code: recipe 4.2",
    ]
    assert rule == ["---", *["---:"] * 5]
    assert rows == [
        ["prose, 8 sequences, seed 3", "100 %", "0.5000", "0.2500", "0.7500", "0.5000"],
        ["bible, 8 sequences, seed 3", "62 %", "0.1000", "0.0500", "0.3500", "0.3000"],
        ["code, 8 sequences, seed 3", "-", "1.0000", "0.5000", "1.2500", "0.7500"],
    ]
    assert "-0.2500" in loss.splitlines()[2]
    assert len({len(line) for line in kl.splitlines()}) == 1, "columns are not aligned"
