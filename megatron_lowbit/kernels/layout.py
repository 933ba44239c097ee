"""How a row of a payload is laid out: what kernels and `codecs.wire` must agree on."""


def row_bytes(body_bytes: int, floats: int) -> int:
    """Bytes of a row with a body of `body_bytes` and `floats` BF16 values.

    The body is padded to an even number of bytes where BF16 values follow.
    """
    return body_bytes + (body_bytes % 2 + 2 * floats if floats else 0)
