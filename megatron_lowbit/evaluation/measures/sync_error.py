"""Error at each sync point: the sums of all variants on the activations of native communication.

So each number is the error of one quantization (in two-shot: of two) alone, and not of what comes
before it in the model. SQNR, the signal to quantization noise ratio, is 10 log10 of the sum of
squares over the sum of squared errors, in dB, over all tokens of all sequences; the exact sum is
that of the partials in fp32, the other what the model would get, rounded to its dtype.

What counts is the error of the residual stream behind a sync point: with error feedback an error is
repaired by the next sum, without it all pile up. Its SQNR is that of all that the sync points have
added up to there, against the same of the variant's sums.
"""

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.evaluation.measures.measure import NATIVE, Record, Scores
from megatron_lowbit.model.language_model import LanguageModel
from megatron_lowbit.model.stages import Stages

# A sync point is named whose SQNR is below the first, or below its codec's median by the second.
LOW_DB = 10.0
BELOW_MEDIAN_DB = 10.0
_NAMED = 4  # in a line; the JSON output has all

# (number of the sync point, exact fp32 sum, variant -> its sum); sums are [..., hidden].
Observer = Callable[[int, Tensor, dict[str, Tensor]], None]


class SyncError:
    """SQNR of every sync point and variant.

    The native run of a unit, a sequence, does it all: each sync point sums its partials by every
    variant and goes on with the native sum. The runs through the variants have nothing to do. In a
    pipeline the stages take turns, a run each, since what a stage adds to the stream lies on what
    those before it have added.
    """

    name = "sync points"
    unit = "sequence"

    def __init__(
        self,
        sequences: Tensor,
        points: list[tuple[int, str]],
        *,
        observing: Callable[[Observer], AbstractContextManager],
        sha256: str,
        first: int = 0,
    ):
        """Measure on `sequences`.

        Args:
            sequences: int64 ``[n, seq_length]``.
            points: Layer and name of each sync point, of all pipeline stages.
            observing: Makes a context in which every sync point of the native model calls the
                observer.
            sha256: Of the text.
            first: The number among `points` of this stage's first one.
        """
        self._sequences, self._points, self._observing = sequences, points, observing
        self._first = first
        self.identity = {"sha256": sha256, "sequences": list(sequences.shape)}

    def __len__(self) -> int:
        return len(self._sequences)

    def run(self, number: int, model: LanguageModel, native: Any) -> tuple[Scores, Any]:
        """One sequence: ``signal``, and by variant ``noise`` and ``worst``, each by sync point.

        And the same of the stream: ``added``, and by variant ``drift``.
        """
        if native is not None:
            return {}, None
        meter = _Meter(len(self._points), self._first)
        for turn in range(model.stages.count):
            is_mine = turn == model.stages.number
            with self._observing(meter.observe) if is_mine else nullcontext():
                model.logits(self._sequences[number][None])
            meter.hand_on(model.stages, turn)
        return meter.scores, True

    def summarize(self, records: list[Record]) -> dict:
        """``sequences``, and ``points``: layer, name, and dB by variant.

        Over all tokens, of the worst token, and of the stream behind the sync point.
        """
        scores = [record[NATIVE] for record in records]
        points = []
        for number, (layer, name) in enumerate(self._points):
            signal = sum(one["signal"][number] for one in scores)
            added = sum(one["added"][number] for one in scores)
            sqnr, worst, behind = {}, {}, {}
            for variant in scores[0]["noise"]:
                noise = sum(one["noise"][variant][number] for one in scores)
                sqnr[variant] = _decibel(signal / noise) if noise else math.inf
                worst[variant] = _decibel(_least([s["worst"][variant][number] for s in scores]))
                drift = sum(one["drift"][variant][number] for one in scores)
                behind[variant] = _decibel(added / drift) if drift else math.inf
            entry = {"layer": layer, "name": name, "sqnr": sqnr, "worst_token_sqnr": worst}
            entry["stream_sqnr"] = behind
            points.append(entry)
        return {"sequences": len(records), "points": points}


class _Meter:
    """The scores of one sequence, at `count` sync points; this stage's begin at `first`."""

    def __init__(self, count: int, first: int):
        self._unknown, self._first = [math.nan] * count, first
        self.scores: Scores = {"signal": [*self._unknown], "noise": {}, "worst": {}}
        self.scores |= {"added": [*self._unknown], "drift": {}}
        # By variant: its error so far; of `NATIVE`: what was added.
        self._stream: dict[str, Tensor] = {}

    def observe(self, number: int, exact: Tensor, sums: dict[str, Tensor]) -> None:
        """An `Observer`."""
        point = self._first + number
        signal = exact.double().square().sum(dim=-1)
        self.scores["signal"][point] = signal.sum().item()
        self.scores["added"][point] = self._grow(NATIVE, exact)
        for variant, total in sums.items():
            noise = (total.double() - exact.double()).square().sum(dim=-1)
            ratio = torch.where(noise == 0, torch.inf, signal / noise)
            self._note("noise", variant, point, noise.sum().item())
            self._note("worst", variant, point, ratio.min().item())
            self._note("drift", variant, point, self._grow(variant, total.float() - exact))

    def hand_on(self, stages: Stages, turn: int) -> None:
        """Go on from what the stage had that observed last."""
        if stages.count > 1:
            there = {variant: values.cpu() for variant, values in self._stream.items()}
            self.scores, self._stream = stages.shared((self.scores, there), source=turn)

    def _note(self, key: str, variant: str, point: int, value: float) -> None:
        self.scores[key].setdefault(variant, [*self._unknown])[point] = value

    def _grow(self, key: str, values: Tensor) -> float:
        """Add `values` to what is in the stream: the sum of squares of all that is there."""
        grown = values.double()
        if key in self._stream:
            grown = grown + self._stream[key].to(grown.device)
        self._stream[key] = grown
        return grown.square().sum().item()


def extremes(points: list[dict]) -> list[str]:
    """A line for each variant with sync points that are far worse than others, or not finite.

    A variant with error feedback sends there what the last sync point missed, too: of its sums only
    those that are not finite are named.
    """
    lines = []
    for variant in points[0]["sqnr"] if points else ():
        values = {f"layer {p['layer']} {p['name']}": p["sqnr"][variant] for p in points}
        # A sum without error, as of a pruned layer's zeros, tells nothing of the others.
        finite = [value for value in values.values() if math.isfinite(value)]
        median = statistics.median(finite) if finite else math.nan
        bad = {
            name: value
            for name, value in values.items()
            if value != math.inf
            and not (value >= LOW_DB and value >= median - BELOW_MEDIAN_DB)
            and (math.isnan(value) or "@feedback" not in variant)
        }
        if bad:
            lines.append(f"{variant}: {_listed(bad)} (median {median:.1f})")
    return lines


def _listed(bad: dict[str, float]) -> str:
    """Sync points, the worst first."""
    worst = sorted(bad, key=lambda name: -math.inf if math.isnan(bad[name]) else bad[name])
    texts = [
        f"{name} is not finite" if math.isnan(bad[name]) else f"{name} has {bad[name]:.1f} dB"
        for name in worst[:_NAMED]
    ]
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return ", ".join(texts) + more


def _decibel(ratio: float) -> float:
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan


def _least(values: list[float]) -> float:
    """The smallest; NaN if one is."""
    return math.nan if any(map(math.isnan, values)) else min(values)
