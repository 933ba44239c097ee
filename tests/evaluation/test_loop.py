"""The evaluation loop and its journal: data-parallel ranks and interruption change no byte."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

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


def _over_stages(rank: int, directory: str) -> tuple:
    """Every rank is a pipeline stage with two sync points, and sees the same logits."""
    return _evaluate(Path(directory) / "journal", stages=Stages(dist.group.WORLD))


def _interrupted(rank: int, directory: str) -> dict:
    """Dies at the fourth sequence, in the middle of a line; then goes on in every wrong way."""
    path = Path(directory) / "journal"
    found = {"died": _evaluate(path, dies_at=3)}
    (part,) = path.glob("part*")
    found["lines"] = part.read_text().count("\n")
    part.write_bytes(part.read_bytes()[:-20])
    text = {"text a": {"sha256": "1", "tokens": 40, "seq_length": 9}}
    found["other text"] = _evaluate(path, resume=True, changed=text)
    found["other size"] = _evaluate(path, resume=True, changed={"size": 8})
    found["resumed"] = _evaluate(path, resume=True)
    found["again"] = _evaluate(path, resume=True)
    found["over"] = _evaluate(path)
    whole = part.read_text()
    part.write_text("x" + whole)
    found["damaged"] = _evaluate(path, resume=True)
    found["wrong"] = []
    for old, new in (
        ('"unit": 0', '"unit": 1'),
        ('"unit": 0', '"unit": "0"'),
        ('"unit": 0', '"unit": false'),
        ('"record": {', '"record": {"native": 3, "extra": '),
        ('"measure": "', '"measure": "\\ud800'),
        ("{", "[" * 100_000),
    ):
        part.write_text(whole.replace(old, new, 1))
        found["wrong"].append(_evaluate(path, resume=True))
    return found


def _resume_in_parallel(rank: int, directory: str) -> tuple:
    return _evaluate(Path(directory) / "journal", resume=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    text, calls = run_ranks(1, _alone, tmp_path_factory.mktemp("alone"))[0]
    assert calls == 7 * (1 + len(LEVELS))
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


def test_data_parallel_ranks_give_the_same_bytes(alone, tmp_path):
    results = run_ranks(3, _alone, tmp_path)
    assert [text for text, _ in results] == [alone] * 3
    assert sum(calls for _, calls in results) == 7 * (1 + len(LEVELS)), "each unit ran once"


def test_pipeline_stages_give_the_same_scores_and_add_up_what_they_sent(alone, tmp_path):
    results = run_ranks(2, _over_stages, tmp_path / "ranks", str(tmp_path))
    expected, of_one = json.loads(alone)
    for text, calls in results:
        summaries, traffic = json.loads(text)
        assert summaries == expected
        assert calls == 7 * (1 + len(LEVELS)), "each stage ran every unit"
        for name, counted in traffic.items():
            for key in ("values", "payload_bytes", "sent_bytes"):
                assert counted[key] == 2 * of_one[name][key], key
            assert counted["tokens"] == of_one[name]["tokens"]
    (part,) = (tmp_path / "journal").glob("part*")
    assert part.read_text().count("\n") == 7, "one stage writes"


def test_an_interrupted_evaluation_goes_on(alone, tmp_path):
    found = run_ranks(1, _interrupted, tmp_path / "ranks", str(tmp_path))[0]
    assert found["died"] == "died"
    assert found["lines"] == 3
    text, calls = found["resumed"]
    assert text == alone
    assert calls == 5 * (1 + len(LEVELS)), "two whole lines were left"
    assert found["again"] == (alone, 0)
    assert found["over"] == (alone, 7 * (1 + len(LEVELS))), "without resume all is measured again"


def test_another_evaluation_is_refused_and_what_differs_is_said(tmp_path):
    found = run_ranks(1, _interrupted, tmp_path / "ranks", str(tmp_path))[0]
    assert "another evaluation (text a seq_length: 8 there, 9 here): run" in found["other text"]
    assert "another evaluation (size: 3 there, 8 here): run without" in found["other size"]
    for message in (found["damaged"], *found["wrong"]):
        assert isinstance(message, str), "it went on"
        assert "cannot resume from" in message and "run without --resume" in message
        assert message.isprintable()


def test_resuming_with_more_ranks(alone, tmp_path):
    run_ranks(1, _start_and_die, tmp_path / "first", str(tmp_path))
    results = run_ranks(2, _resume_in_parallel, tmp_path / "second", str(tmp_path))
    assert [text for text, _ in results] == [alone] * 2
    assert sum(calls for _, calls in results) == 4 * (1 + len(LEVELS))


def _start_and_die(rank: int, directory: str) -> str:
    return _evaluate(Path(directory) / "journal", dies_at=3)
