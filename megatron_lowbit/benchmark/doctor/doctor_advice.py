"""What times say of a model's passes, and what to do: pure functions, and the text of it.

A pass is a step of decoding for so many sequences, or the prefill of a prompt. Its time here is
that of its sums alone, codecs included: what the model computes in between is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lowbit.comm.policy.timings import BF16_BYTES, NATIVE, ByTimes, size_text
from megatron_lowbit.text_table import aligned

DECODE = (1, 16, 64)  # sequences
PREFILL = (256, 1024, 4096)  # tokens


@dataclass(frozen=True)
class Pass:
    """One pass, by native sums and as `auto` would do it.

    Attributes:
        phase: ``decode`` or ``prefill``.
        tokens: Sequences of a step, or tokens of the prompt.
        size: Bytes of each message in BF16.
        ms: Milliseconds by collective, ``native`` among them; NaN where nothing was timed.
        taken: What `auto` takes.
        taken_ms: How long that is; in native it may have fewer sums, where some have 0 bits.
        perhaps: What may be faster where native is kept, and what it takes of native's time then.
        is_timed: Whether messages as long were timed; or else it goes by shorter ones.
    """

    phase: str
    tokens: int
    size: int
    ms: dict[str, float]
    taken: str
    taken_ms: float
    perhaps: dict[str, float]
    is_timed: bool

    @property
    def speedup(self) -> float:
        """Native's time over that of `auto`."""
        return self.ms[NATIVE] / self.taken_ms

    @property
    def name(self) -> str:
        """In words."""
        if self.phase == "prefill":
            return f"prefill, {self.tokens} tokens"
        return f"decode, {self.tokens} sequence{'s' if self.tokens > 1 else ''}"


def passes(times: ByTimes, hidden: int, longest: int, *, skipped: int = 0) -> list[Pass]:
    """The passes of a model.

    Args:
        times: Of its sync points on this group.
        hidden: Features of a token.
        longest: Tokens that a prompt can have.
        skipped: Sync points of 0 bits, which cost a sum in native alone.
    """
    prompts = [n for n in PREFILL if n <= longest] or [longest]
    named = [*(("decode", n) for n in DECODE), *(("prefill", n) for n in prompts)]
    return [_pass(times, phase, tokens, hidden, skipped) for phase, tokens in named]


def _pass(times: ByTimes, phase: str, tokens: int, hidden: int, skipped: int) -> Pass:
    size = BF16_BYTES * tokens * hidden
    kinds, timings = times.kinds, times.timings
    ms = {name: timings.pass_ms(kinds, name, size) for name in (NATIVE, *times.candidates)}
    taken = times.decide(NATIVE, size).collective
    taken_ms, count = ms[taken], sum(kind.count for kind in kinds)
    ms[NATIVE] *= (count + skipped) / count
    perhaps = times.perhaps(NATIVE, size) if taken == NATIVE else {}
    perhaps = {name: ratio * count / (count + skipped) for name, ratio in perhaps.items()}
    return Pass(phase, tokens, size, ms, taken, taken_ms, perhaps, size <= timings.sizes()[-1])


def unsure(perhaps: dict[str, float]) -> str:
    """The best that may be, in words; empty if nothing is."""
    if not perhaps:
        return ""
    name = min(perhaps, key=perhaps.__getitem__)
    return f"{name} perhaps up to {1 / perhaps[name]:.2f}x"


def table(found: Sequence[Pass]) -> list[str]:
    """Lines: what each pass takes."""
    names = list(found[0].ms)
    rows = [["pass", "message", *names]]
    ends = ["auto takes"]
    for one in found:
        rows.append([one.name, size_text(one.size), *(_ms(one.ms[name]) for name in names)])
        gain = f", {one.speedup:.2f}x" if one.speedup != 1 else ""
        notes = [unsure(one.perhaps), "" if one.is_timed else "longer than what was timed"]
        said = f" ({'; '.join(filter(None, notes))})" if any(notes) else ""
        ends.append(one.taken + gain + said)
    return [f"{line}  {end}" for line, end in zip(aligned(rows), ends, strict=True)]


def undecided(found: Sequence[Pass]) -> list[str]:
    """A line, where native is kept and low bits may be faster, or were not timed so long."""
    kept = [one for one in found if one.taken == NATIVE]
    if not (names := [one.name for one in kept if one.perhaps or not one.is_timed]):
        return []
    return [f"Not surely decided: {'; '.join(names)}. More --seconds may tell."]


def expected(found: Sequence[Pass]) -> list[str]:
    """Lines: time to first token and per token, for the longest prompt and the smallest batch."""
    prompt = [one for one in found if one.phase == "prefill"][-1]
    step = found[0]
    return [
        f"time to first token, {prompt.tokens} tokens: {_ms(prompt.ms[NATIVE])} in native sums, "
        f"{_ms(prompt.taken_ms)} by auto",
        f"time per token, one sequence: {_ms(step.ms[NATIVE])} in native sums, "
        f"{_ms(step.taken_ms)} by auto",
        "(sums alone, codecs included; what the model computes comes on top of both)",
    ]


def advice(found: Sequence[Pass], tuning: str | None, calibrate: str | None) -> list[str]:
    """Lines: whether low bits are for this model here, and the flags.

    Args:
        found: From `passes`.
        tuning: The tuning file that was written, if one was.
        calibrate: The command that makes the index, where there is none yet.
    """
    gains = [one for one in found if one.taken != NATIVE]
    if not gains:
        if any(one.speedup > 1 for one in found):
            line = "Low bits gain only what the skipped sync points save: all others stay native."
        else:
            line = (
                "Leave low bits off here: native is as fast, or low bits are not surely faster, in "
                "every pass above."
            )
        return [line, *undecided(found)]
    kept = [one.name for one in found if one.taken == NATIVE]
    each = "; ".join(f"{one.name} {one.speedup:.1f}x by {one.taken}" for one in gains)
    lines = [f"Low bits are faster here: {each}."]
    if kept:
        lines.append(f"auto keeps native: {'; '.join(kept)}.")
    lines += undecided(found)
    if calibrate is not None:
        lines.append(f"first:  {calibrate}")
    flags = "--lowbit-tp-comm" + (f" --lowbit-tuning {tuning}" if tuning else "")
    lines.append(f"flags:  {flags}")
    ways = {one.taken for one in found}
    if len(ways) == 1:
        lines.append(
            f"or:     --lowbit-tp-comm --lowbit-collective {ways.pop()}    (the same bits in every "
            "batch)"
        )
    return lines


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
