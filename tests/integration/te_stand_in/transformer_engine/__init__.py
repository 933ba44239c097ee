"""Stand-in for Transformer Engine on a CPU, for tests.

What megatron.core needs to import and to run its TE layers in BF16, with TE's names, places,
attributes and communication (release 2.6): what is muted from outside, and what a
forward and a backward pass send and when. Matrix products are torch's, and there is no FP8.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"
__all__ = ["common", "pytorch"]
