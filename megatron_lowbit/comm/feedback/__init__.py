"""Error feedback: each sum sends what the one before it did not.

chain   carries between the sums of one stream, and when one may be taken
ways    what each way to sum does with them
"""

from megatron_lowbit.comm.feedback.chain import SLOTS, Chain, ErrorFeedback, Feedback, Step

__all__ = ["SLOTS", "Chain", "ErrorFeedback", "Feedback", "Step"]
