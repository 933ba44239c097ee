"""What the patch files change in Megatron: one purpose an edit, described by what it stands beside.

A line of one function is the anchor, found by its text and not by its number, so that the same
description serves every release: `tools/patchctl.py make TREE` finds it there, or says what is
gone. The code that is put in only calls this package. Megatron's copyright stays with its owners;
nothing of it is kept here but the anchors.
"""

import ast
import textwrap
from dataclasses import dataclass
from typing import Any

from megatron_lowbit.errors import LowbitError


@dataclass(frozen=True)
class Edit:
    """One purpose: the file and the function that it changes, and how."""

    name: str  # the patch file's, without its ending
    path: str
    scope: str  # such as RowParallelLinear.forward
    # Lines of the function, and what takes the place of each, that line included.
    replacements: dict[str, str]
    purpose: str
    removal: str  # when it is no longer needed
    # Unchanged lines around each change in the patch file. Fewer than three where the third differs
    # between releases.
    context: int = 3

    def apply(self, text: str) -> str:
        """A file's text with the edit in it.

        Raises:
            LowbitError: The function or an anchor is not there, or not once.
        """
        for anchor, replacement in self.replacements.items():
            before, lines, after = self._parts(text)
            places = [number for number, line in enumerate(lines) if line.strip() == anchor]
            if len(places) != 1:
                raise LowbitError(
                    f"{self.path}: {self.scope} has {len(places)} lines {anchor!r}, not one: "
                    f"describe {self.name} anew in {__name__}"
                )
            (place,) = places
            indent = lines[place][: -len(lines[place].lstrip())]
            lines[place] = textwrap.indent(textwrap.dedent(replacement).strip(), indent)
            text = "\n".join(before + lines + after)
        return text

    def require_inside(self, text: str, patched: str) -> None:
        """Raise LowbitError unless `patched` compiles and has changed in the function only."""
        before, _, after = self._parts(text)
        if self._parts(patched)[::2] != (before, after):
            raise LowbitError(
                f"{self.name} would change {self.path} outside {self.scope}: make a patch for this "
                "release by python -m megatron_lowbit patch make"
            )

    def _parts(self, text: str) -> tuple[list[str], list[str], list[str]]:
        """The lines before the function, its own, and those after it."""
        try:
            node: Any = ast.parse(text)
        except SyntaxError as error:
            raise LowbitError(
                f"{self.path} does not compile (line {error.lineno}: {error.msg})"
            ) from None
        for name in self.scope.split("."):
            found = [child for child in node.body if getattr(child, "name", None) == name]
            if len(found) != 1:
                raise LowbitError(
                    f"{self.path} has {len(found)} {self.scope}, not one: not a Megatron we know"
                )
            (node,) = found
        lines, first, last = text.split("\n"), node.lineno - 1, node.end_lineno
        return lines[:first], lines[first:last], lines[last:]


EDITS = (
    Edit(
        name="row_parallel_hook",
        path="megatron/core/tensor_parallel/layers.py",
        scope="RowParallelLinear.forward",
        # vars: for a name that is not there, getattr of an nn.Module takes 20 times as long.
        replacements={
            "if self.explicit_expert_comm:": """
                lowbit_reduce = vars(self).get('lowbit_reduce')  # set by megatron_lowbit
                if lowbit_reduce is not None:
                    output_ = lowbit_reduce(output_parallel, self.sequence_parallel)
                elif self.explicit_expert_comm:
                """,
        },
        purpose="A row-parallel linear hands its partial to megatron_lowbit where one asks for it, "
        "in the place of Megatron's own reduction; also where it adds its bias itself.",
        removal="When Megatron lets a reduction be given to RowParallelLinear, or when the fork no "
        "longer has linears with skip_bias_add=False among its sync points: without this patch "
        "megatron_lowbit mutes the linear and sums in a forward hook.",
    ),
    Edit(
        name="arguments",
        path="megatron/training/arguments.py",
        scope="add_megatron_arguments",
        replacements={
            "parser = _add_distributed_args(parser)": """
                parser = _add_distributed_args(parser)
                # Only who gives one of its arguments needs megatron_lowbit.
                import importlib.util, sys
                if importlib.util.find_spec('megatron_lowbit') or '--lowbit-' in ' '.join(sys.argv):
                    from megatron_lowbit.integration import hooks  # missing: pip install it here
                    parser = hooks.add_arguments(parser)
                """,
        },
        purpose="--lowbit-tp-comm and its companions among Megatron's own arguments.",
        removal="When scripts are started by python -m megatron_lowbit.launch, or when Megatron "
        "lets a package add arguments to all of its scripts.",
    ),
    Edit(
        name="load_hook",
        path="megatron/training/checkpointing.py",
        scope="load_checkpoint",
        replacements={
            "return 0, 0": """
                if hasattr(args, 'lowbit_tp_comm'):  # by megatron_lowbit: it says why not
                    from megatron_lowbit.integration import hooks
                    hooks.checkpoint_loaded(ddp_model)
                return 0, 0
                """,
            "# Some utilities want to load a checkpoint without distributed being initialized": """
                if hasattr(args, 'lowbit_tp_comm'):  # by megatron_lowbit
                    from megatron_lowbit.integration import hooks
                    hooks.checkpoint_loaded(ddp_model)

                # Some utilities want to load a checkpoint without distributed being initialized
                """,
        },
        context=2,
        purpose="With --lowbit-tp-comm low bits are switched on as soon as the weights are there. "
        "Needs arguments.patch: without its arguments nothing is called.",
        removal="When scripts are started by python -m megatron_lowbit.launch, or when Megatron "
        "calls a hook of the user's after it has loaded a checkpoint.",
    ),
)
