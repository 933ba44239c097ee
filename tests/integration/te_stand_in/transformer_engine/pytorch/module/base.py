import torch
import torch.distributed as dist


class TransformerEngineBaseModule(torch.nn.Module):
    """Tensor-parallel attributes, and the `_extra_state` that TE adds to every state_dict."""

    def _set_parallelism(self, mode, tp_group, tp_size, sequence_parallel, overlap, name):
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.tp_group = tp_group
        self.parallel_mode = mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        rows = mode == "row" and self.sequence_parallel
        columns = mode == "column" and self.sequence_parallel
        self.ub_overlap_rs_fprop = rows and overlap["ub_overlap_rs"]
        self.ub_overlap_ag_dgrad = rows and overlap["ub_overlap_ag"]
        self.ub_overlap_ag_fprop = columns and overlap["ub_overlap_ag"]
        self.ub_overlap_rs_dgrad = columns and overlap["ub_overlap_rs"]
        self.ub_name = name

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        """Nothing to set without FP8."""
