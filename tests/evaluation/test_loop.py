"""The evaluation loop and its journal: data-parallel ranks and interruption change no byte."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_each_rank, run_ranks

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.traffic import Clock, Counters, Decision, Traffic
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.evaluation_loop import Variant, evaluate
from megatron_lowbit.evaluation.journal import Journal
from megatron_lowbit.evaluation.measures.text import Text
from megatron_lowbit.model.language_model import LanguageModel
from megatron_lowbit.model.stages import WHOLE, Stages

VOCAB, PADDED = 20, 24
SEQUENCES = torch.randint(0, VOCAB, (5, 9), generator=torch.Generator().manual_seed(3))
LEVELS = (0.0, 0.1, 0.5)
ALL = 7 * (1 + len(LEVELS))  # runs of the model: native and each variant on seven sequences


class Model:
    """Logits are a table of the token; variants add noise and count; it may die at a sequence."""

    def __init__(self, dies_at: int | None = None):
        self.noise, self.calls, self.dies_at = 0.0, 0, dies_at
        self.weights = torch.randn(VOCAB, PADDED, generator=torch.Generator().manual_seed(1))
        self.traffic = {level: [Traffic(), Traffic()] for level in LEVELS}
        self.counts = False

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.dies_at is not None and torch.equal(tokens[0], SEQUENCES[self.dies_at, :-1]):
            raise InterruptedError
        self.calls += 1
        for one in self.traffic[self.noise] if self.counts else ():
            # Odd numbers, so that a sum that misses a unit shows.
            counters = Counters(1, tokens.numel(), 100 * tokens.numel(), int(tokens.sum()) + 50, 7)
            one.add(Decision("one-shot", "fixed"), counters, Clock(tokens.device).stop())
        return self.weights[tokens] + self.noise * self.weights[tokens].flip(-1)

    def variants(self) -> list[Variant]:
        return [Variant(str(n), lambda n=n: self._active(n), self.traffic[n]) for n in LEVELS]

    @contextlib.contextmanager
    def _active(self, level: float):
        self.noise, self.counts = level, True
        yield
        self.noise, self.counts = 0.0, False


def _evaluate(
    directory: Path | None, *, resume=False, dies_at=None, changed=None, stages=WHOLE
) -> tuple | str:
    """Two texts; what comes out as JSON text, and how often the model ran here."""
    model = Model(dies_at)
    mine = dist.new_subgroups(1)[0]  # each rank is a tensor-parallel group of its own
    seen = LanguageModel(model.logits, VOCAB, 99, mine, list, str, stages=stages)
    texts = [Text("a", SEQUENCES, sha256="1"), Text("b", SEQUENCES[:2], sha256="2")]
    identity = {"size": 3, **{text.name: text.identity for text in texts}, **(changed or {})}
    dp_group = mine if stages.count > 1 else dist.group.WORLD
    try:
        journal, done = None, []
        if directory:
            groups = {"dp_group": dp_group, "tp_group": mine, "stages": stages}
            journal = Journal(directory, identity, **groups)
            done = journal.start(resume=resume)
        result = evaluate(
            texts,
            seen,
            model.variants(),
            journal=journal,
            done=done,
            dp_group=dp_group,
            track=lambda name, unit: iter,
        )
    except InterruptedError:
        return "died"
    except LowbitError as error:
        return str(error)
    traffic = {name: vars(counters) for name, counters in result.traffic.items()}
    return json.dumps([result.summaries, traffic]), model.calls


def _alone(rank: int) -> tuple:
    return _evaluate(None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    text, calls = run_ranks(1, _alone, tmp_path_factory.mktemp("alone"))[0]
    assert calls == ALL
    return text


def test_scores_of_a_text(alone):
    summaries, traffic = json.loads(alone)
    text = summaries["text a"]
    assert (text["name"], text["tokens"], text["seq_length"]) == ("a", 5 * 8, 8)
    same, little, much = text["results"]
    assert same["kl"] == same["delta_nll"] == 0
    assert same["top1"] == 1
    assert same["perplexity"] == text["native"]["perplexity"]
    assert 0 < little["kl"] < much["kl"]
    assert much["kl_stderr"] > 0
    tokens = 7 * 8
    assert traffic["0.1"]["tokens"] == tokens, "of one sync point"
    assert traffic["0.1"]["values"] == 2 * 100 * tokens
    read = int(SEQUENCES[:, :-1].sum() + SEQUENCES[:2, :-1].sum())
    assert traffic["0.1"]["payload_bytes"] == 2 * (read + 50 * 7)


def test_perplexity_and_difference_by_hand(alone):
    weights = Model().weights[:, :VOCAB]
    log_probs = torch.log_softmax(weights[SEQUENCES[:, :-1]], -1)
    nll = -log_probs.gather(-1, SEQUENCES[:, 1:, None])[..., 0].double()
    text = json.loads(alone)[0]["text a"]
    assert text["native"]["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    noisy = weights + 0.5 * Model().weights.flip(-1)[:, :VOCAB]
    other = torch.log_softmax(noisy[SEQUENCES[:, :-1]], -1)
    delta = -other.gather(-1, SEQUENCES[:, 1:, None])[..., 0].double() - nll
    result = text["results"][2]
    assert result["delta_nll"] == pytest.approx(delta.mean().item(), rel=1e-5)
    error = delta.mean(dim=1).std() / 5**0.5
    assert result["delta_nll_stderr"] == pytest.approx(error.item(), rel=1e-5)


@on_each_rank(3)
def test_data_parallel_ranks_give_the_same_bytes(rank, alone):
    text, calls = _evaluate(None)
    assert text == alone
    assert sum(gather_values(calls)) == ALL, "each unit ran once"


@on_each_rank(2)
def test_pipeline_stages_give_the_same_scores_and_add_up_what_they_sent(rank, alone, tmp_path):
    """Every rank is a pipeline stage with two sync points, and sees the same logits."""
    text, calls = _evaluate(tmp_path / "journal", stages=Stages(dist.group.WORLD))
    (expected, of_one), (summaries, traffic) = json.loads(alone), json.loads(text)
    assert summaries == expected
    assert calls == ALL, "each stage ran every unit"
    for name, counted in traffic.items():
        for key in ("values", "payload_bytes", "sent_bytes"):
            assert counted[key] == 2 * of_one[name][key], key
        assert counted["tokens"] == of_one[name]["tokens"]
    dist.barrier()
    (part,) = (tmp_path / "journal").glob("part*")
    assert part.read_text().count("\n") == 7, "one stage writes"


@on_each_rank(1)
def test_an_interrupted_evaluation_goes_on(rank, alone, tmp_path):
    part = _interrupted(tmp_path / "journal")
    assert part.read_text().count("\n") == 3
    part.write_bytes(part.read_bytes()[:-20])  # in the middle of a line
    text, calls = _evaluate(tmp_path / "journal", resume=True)
    assert text == alone
    assert calls == 5 * (1 + len(LEVELS)), "two whole lines were left"
    assert _evaluate(tmp_path / "journal", resume=True) == (alone, 0)
    assert _evaluate(tmp_path / "journal") == (alone, ALL), "without resume all is measured again"


def _interrupted(journal: Path) -> Path:
    """Dies at the fourth sequence; the journal's only file."""
    assert _evaluate(journal, dies_at=3) == "died"
    (part,) = journal.glob("part*")
    return part


@on_each_rank(1)
def test_another_evaluation_is_refused_and_what_differs_is_said(rank, tmp_path):
    part = _interrupted(tmp_path / "journal")
    text = {"text a": {"sha256": "1", "tokens": 40, "seq_length": 9}}
    for changed, message in (
        (text, "another evaluation (text a seq_length: 8 there, 9 here): run"),
        ({"size": 8}, "another evaluation (size: 3 there, 8 here): run without"),
    ):
        assert message in _evaluate(tmp_path / "journal", resume=True, changed=changed)
    whole = part.read_text()
    for old, new in (
        ("", "x"),
        ('"unit": 0', '"unit": 1'),
        ('"unit": 0', '"unit": "0"'),
        ('"unit": 0', '"unit": false'),
        ('"record": {', '"record": {"native": 3, "extra": '),
        ('"measure": "', '"measure": "\\ud800'),
        ("{", "[" * 100_000),
    ):
        part.write_text(whole.replace(old, new, 1))
        said = _evaluate(tmp_path / "journal", resume=True)
        assert isinstance(said, str), "it went on"
        assert "cannot resume from" in said and "run without --resume" in said
        assert said.isprintable()


def _start_and_die(rank: int, directory: Path) -> None:
    _interrupted(directory / "journal")


@pytest.fixture
def begun(tmp_path) -> None:
    """One rank began an evaluation in `tmp_path`, and died."""
    run_ranks(1, _start_and_die, tmp_path / "first", tmp_path)


@on_each_rank(2)
def test_resuming_with_more_ranks(rank, begun, alone, tmp_path):
    text, calls = _evaluate(tmp_path / "journal", resume=True)
    assert text == alone
    assert sum(gather_values(calls)) == 4 * (1 + len(LEVELS))
