"""Which codecs are other systems' formats, and by what collective those systems send them.

A two-shot system quantizes each partial and then the sum, so its error is two-shot's
(`codecs.base`: `Codec.reduce_encode`), while a one-shot system quantizes the partials alone. To
judge a peer by the wrong one is to judge another system.
"""

from typing import Literal, NamedTuple


class Peer(NamedTuple):
    """A codec's origin.

    Attributes:
        system: Whose format it is.
        collective: How that system sums partials, by its source or paper; None where no system is
            known that sums partials in this format.
    """

    system: str
    collective: Literal["one-shot", "two-shot"] | None


PEERS = {
    "int4-g32": Peer("QuickReduce", "two-shot"),
    "int4-g16": Peer("aiter (FlyDSL)", "two-shot"),
    "int4-g32-asym": Peer("Flash Communication", "two-shot"),
    "int4-g128-asym": Peer("Flash Communication", "two-shot"),
    "spike-g32": Peer("FlashCommunication V2", "two-shot"),
    "mxfp4": Peer("Communication Compression for TP", "one-shot"),
    "nvfp4": Peer("NVIDIA's format", None),
    "fp8-g256": Peer("FlashInfer", "two-shot"),
    "int8-token": Peer("SGLang (NPU)", "one-shot"),
    "int8-g32": Peer("distributed-llama", "one-shot"),
    "sdp4bit": Peer("SDP4Bit", "two-shot"),
    "sdp4bit-plain": Peer("COCCL", "two-shot"),
}
