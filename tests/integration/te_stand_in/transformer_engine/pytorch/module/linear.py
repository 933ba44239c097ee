import torch
import torch.distributed as dist

from transformer_engine.pytorch.distributed import (
    allreduce,
    gather_along_first_dim,
    reduce_scatter_along_first_dim,
)
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class _Linear(torch.autograd.Function):
    """A matrix product and the communication around it, as TE has them."""

    @staticmethod
    def forward(ctx, weight, inp, bias, parallel_mode, tp_group, tp_size, sequence_parallel):
        ctx.args = parallel_mode, tp_group, tp_size, sequence_parallel
        ctx.has_bias = bias is not None
        ctx.save_for_backward(weight, inp)
        if parallel_mode == "column" and sequence_parallel:
            inp, _ = gather_along_first_dim(inp, tp_group)
        out = torch.matmul(inp, weight.t())
        if bias is not None:
            out = out + bias
        if parallel_mode == "row" and tp_size > 1:
            if sequence_parallel:
                out, _ = reduce_scatter_along_first_dim(out, tp_group)
            else:
                out, _ = allreduce(out, tp_group)
        return out

    @staticmethod
    def backward(ctx, grad):
        weight, inp = ctx.saved_tensors
        parallel_mode, tp_group, tp_size, sequence_parallel = ctx.args
        if parallel_mode == "row" and sequence_parallel:
            grad, _ = gather_along_first_dim(grad, tp_group)
        if parallel_mode == "column" and sequence_parallel:
            inp, _ = gather_along_first_dim(inp, tp_group)
        dgrad = grad.matmul(weight)
        if parallel_mode == "column" and tp_size > 1:
            if sequence_parallel:
                dgrad, _ = reduce_scatter_along_first_dim(dgrad, tp_group)
            else:
                dgrad, _ = allreduce(dgrad, tp_group)
        rows = grad.reshape(-1, grad.shape[-1])
        wgrad = rows.t().matmul(inp.reshape(-1, inp.shape[-1]))
        bias_grad = rows.sum(0) if ctx.has_bias else None
        return wgrad, dgrad, bias_grad, None, None, None, None


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        tp_group=None,
        tp_size=1,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cpu",
        ub_overlap_rs=False,
        ub_name=None,
        symmetric_ar_type=None,
        **unused,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.symmetric_ar_type = symmetric_ar_type
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.tp_group = tp_group
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        scatters = parallel_mode == "row" and self.sequence_parallel
        self.ub_overlap_rs_fprop = scatters and ub_overlap_rs
        self.ub_name = ub_name
        if self.parallel_mode == "column":
            self.out_features //= self.tp_size
        elif self.parallel_mode == "row":
            self.in_features //= self.tp_size
        shape = self.out_features, self.in_features
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        init_method(self.weight)
        rows = torch.zeros(self.out_features if bias else 0, dtype=params_dtype, device=device)
        self.bias = torch.nn.Parameter(rows) if bias else rows
        self.gemm_bias_unfused_add = self.parallel_mode == "row" and self.apply_bias

    def forward(self, inp, is_first_microbatch=None):
        out = _Linear.apply(
            self.weight,
            inp,
            self.bias if self.apply_bias and not self.gemm_bias_unfused_add else None,
            self.parallel_mode,
            self.tp_group,
            self.tp_size,
            self.sequence_parallel,
        )
        if self.gemm_bias_unfused_add:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out
