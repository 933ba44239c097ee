"""Megatron's dynamic inference engine on a machine without CUDA: its kernels, in plain torch.

The dynamic engine keeps keys and values in blocks ("pages") and leaves attention over them to
flash-attn, the writing of new keys and values and the bookkeeping of speculative decoding to
Triton. Here is what stands in for flash-attn's two functions, with their signatures and meaning
(https://github.com/Dao-AILab/flash-attention, `flash_attn_interface.py`); for the Triton kernels
Megatron has torch versions of its own. `enable_cpu_engines` puts them in place.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.integration.cpu.device import enable_cpu

_CONTEXT = "megatron.core.inference.contexts.dynamic_context"
_CONTROLLER = "megatron.core.inference.text_generation_controllers.text_generation_controller"


def enable_cpu_engines() -> bool:
    """Makes Megatron's dynamic engine run on a machine without CUDA; nothing where CUDA is present.

    It calls `enable_cpu` and imports megatron-core; call it before an engine is made. A second call
    does nothing more.

    Returns:
        True if this machine has no CUDA and the stand-ins are in place, False if CUDA is present.
    """
    if not enable_cpu():
        return False
    attention: Any = importlib.import_module("megatron.core.transformer.attention")
    attention.flash_attn_varlen_func = flash_attn_varlen_func
    attention.flash_attn_with_kvcache = flash_attn_with_kvcache
    attention.is_fa_min_version = lambda version, check_equality=True: True
    context: Any = importlib.import_module(_CONTEXT)
    # Without the kernel (from 0.15 on) the context writes to its pages by torch.
    context.triton_append_key_value_cache = None
    _use_torch_verification(importlib.import_module(_CONTROLLER))
    return True


def _use_torch_verification(controller: ModuleType) -> None:
    """Megatron's own torch versions of the kernels of speculative decoding, where it has them."""
    package = controller.__name__.rpartition(".")[0]
    try:
        in_torch = importlib.import_module(f"{package}.mtp_utils_pytorch")
    except ModuleNotFoundError:  # before 0.17: no speculative decoding
        return
    for name in (
        "mamba_state_selective_copy",
        "prepare_next_forward_pass",
        "rewind_kv_cache",
        "verify_speculative_tokens",
    ):
        setattr(controller, name, getattr(in_torch, name))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    block_table: Tensor,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of requests of different lengths, laid end to end.

    Args:
        q: ``[tokens, heads, dim]``; behind the requests' tokens there may be padding.
        k: Keys by block ``[blocks, block size, key heads, dim]``.
        v: Values, as `k`.
        cu_seqlens_q: int ``[requests + 1]``: where each request's tokens begin in `q`.
        cu_seqlens_k: int ``[requests + 1]``: sums of the requests' numbers of keys.
        max_seqlen_q: Not needed.
        max_seqlen_k: Not needed.
        softmax_scale: Multiplies the scores; ``dim ** -0.5`` if left out.
        causal: Each token sees the keys up to its own; a request's last token sees all.
        window_size: How many keys to the left and right of its own a token sees; -1: all.
        block_table: int ``[requests, blocks of a request]``: where each request's keys are.
        return_attn_probs: Also return the logarithms of the softmax's sums.

    Returns:
        ``[tokens, heads, dim]``, zero for padding; with `return_attn_probs` also fp32
        ``[heads, tokens]`` and None.
    """
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    sums = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    starts, lengths = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    for start, stop, length, blocks in zip(starts, starts[1:], lengths, block_table, strict=False):
        if stop > start and length > 0:
            out[start:stop], sums[:, start:stop] = _attend(
                q[start:stop],
                _paged(k, blocks, length),
                _paged(v, blocks, length),
                scale=softmax_scale,
                window=(window_size[0], 0 if causal else window_size[1]),
            )
    return (out, sums, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a step of decoding: every request has the same number of new tokens.

    Args:
        q: ``[requests, new tokens, heads, dim]``.
        k_cache: As `k` of `flash_attn_varlen_func`; the new tokens' keys are in it.
        v_cache: Values, as `k_cache`.
        cache_seqlens: int ``[requests]``: numbers of keys, those of the new tokens included; 0
            for padding.
        num_splits: Not needed.
        return_softmax_lse: Also return the logarithms of the softmax's sums.
        **others: As for `flash_attn_varlen_func`.

    Returns:
        ``[requests, new tokens, heads, dim]``; with `return_softmax_lse` also fp32
        ``[requests, heads, new tokens]``.
    """
    requests, tokens, heads, _ = q.shape
    starts = torch.arange(requests + 1) * tokens
    out, sums, _ = flash_attn_varlen_func(
        q.flatten(0, 1),
        k_cache,
        v_cache,
        starts,
        torch.nn.functional.pad(cache_seqlens.cumsum(0), (1, 0)),
        tokens,
        0,
        return_attn_probs=True,
        **others,
    )
    out = out.unflatten(0, (requests, tokens))
    if not return_softmax_lse:
        return out
    return out, sums.unflatten(1, (requests, tokens)).transpose(0, 1)


def _paged(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` rows of the blocks that a request's row of the block table names."""
    needed = -(-length // cache.shape[1])
    return cache[blocks[:needed].long()].flatten(0, 1)[:length]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Attention of one request's last tokens: its output, and the logarithms of softmax's sums."""
    own = torch.arange(len(k) - len(q), len(k))[:, None]  # where each token's own key is
    keys, (left, right) = torch.arange(len(k)), window
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if left >= 0:
        hidden |= keys < own - left
    if right >= 0:
        hidden |= keys > own + right
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    scores.masked_fill_(hidden, -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out.to(q.dtype), scores.logsumexp(-1)
