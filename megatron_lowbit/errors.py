"""Errors of the package: one line, the bad value, and what to do about it."""


class LowbitError(ValueError):
    """A request that cannot be met; the message names the value and the remedy."""


class IndexFileError(LowbitError):
    """A calibration index that is missing, damaged, or made for something else."""


class CorpusError(LowbitError):
    """A calibration or evaluation text that is missing, empty or too short."""
