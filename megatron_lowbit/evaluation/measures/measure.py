"""What is measured: one interface, so that resuming, data parallelism and output are written once.

A `Measure` is a list of units: a sequence of a text, an item of a task, a prompt. For each unit the
model runs in its native communication first and then through every variant; of each run a few
numbers are kept, the unit's *scores*, and from the scores of all units come the results. Scores
are JSON values: they are written to a journal as the evaluation goes, so that an interrupted one
can go on.
"""

from typing import Any, Protocol

from megatron_lowbit.model.language_model import LanguageModel

Scores = dict[str, Any]  # of one unit, by one way to communicate; JSON values only
Record = dict[str, Scores]  # of one unit: "native" and the variants' names -> scores
NATIVE = "native"


class Measure(Protocol):
    """One thing to measure.

    Attributes:
        name: Unique in an evaluation, such as ``text persuasion.txt`` or ``task arc-easy``.
        unit: What one unit is called, for the progress bar: ``sequence``, ``item``.
        identity: JSON value: what the units are made of (digest of the data, lengths, limits). A
            journal of another identity is not resumed.
    """

    name: str
    unit: str
    identity: Any

    def __len__(self) -> int:
        """How many units there are."""

    def run(self, number: int, model: LanguageModel, native: Any) -> tuple[Scores, Any]:
        """Run one unit as the model communicates now.

        Args:
            number: Of the unit.
            model: What to run it through.
            native: What the native run of this unit returned second, for comparison; None in the
                native run itself.

        Returns:
            The scores, the same on every rank of `model.tp_group`, and whatever a comparison needs
            of a native run.
        """

    def summarize(self, records: list[Record]) -> dict:
        """The results, as they go into the JSON output, from the records of all units in order.

        Returns:
            What was measured (``name`` and, say, ``tokens``), ``native``: results of the native
            run, and ``results``: a list with a dict for each variant, its name under ``variant``.
        """
