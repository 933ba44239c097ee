"""A stage whose kernel is wrong, for `test_gpu_rehearsal`."""

from megatron_lowbit.benchmark.gpu_check.work import bit_stage


def encode(task):
    """The stage `bits` with an encode whose first byte is one more, in the rotated codecs."""
    from megatron_lowbit.kernels.triton import rotated

    right = rotated.encode

    def wrong(*arguments, **others):
        payload = right(*arguments, **others)
        payload[:, 0] += 1
        return payload

    rotated.encode = wrong
    yield from bit_stage.run(task)
