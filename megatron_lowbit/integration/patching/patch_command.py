"""Put our patch files into a Megatron, take them out again, or make them.

TREE is the folder that holds megatron/: a Megatron-LM checkout, or where pip put megatron-core
(the Location that pip show megatron-core names). What is in TREE is read, not imported.

  status   say which release TREE is, and which patches are in it
  check    say it, and fail if apply would refuse
  apply    put in the patches that are not in it yet: all of them, or none on an error
  revert   take them out again: an unedited file is then byte for byte as it came
  make     make the patch files from an unpatched TREE, or list it for those that fit it already

Files with changes of yours and releases that the patches' manifest.json does not list are refused
unless a flag says otherwise. A megatron-core package before 0.17 has no megatron/training: there
only row_parallel_hook applies. make needs a checkout of megatron_lowbit, or --patches.

examples:
  python -m megatron_lowbit patch apply ../Megatron-LM
  python -m megatron_lowbit patch status .venv/lib/python3.11/site-packages
  python -m megatron_lowbit patch make ../Megatron-LM --release 0.20.0
"""

import argparse
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import ROOT, is_checkout
from megatron_lowbit.integration.patching.control import State
from megatron_lowbit.integration.patching.make import make


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.described(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("status", "check", "apply", "revert", "make"):
        add = commands.add_parser(name, allow_abbrev=False).add_argument
        add("tree", type=Path, metavar="TREE", help="holds megatron/")
        own = "folder of the patch files (default: those of this package)"
        add("--patches", type=Path, metavar="DIR", help=own)
        if name == "make":
            origin = "where it comes from (default: git's commit, else the package of its version)"
            add("--release", metavar="NAME", help="its name in the manifest (default: its version)")
            add("--upstream", metavar="TEXT", help=origin)
        elif name != "status":
            unlisted = "also a release or fork that the manifest does not list, where every patch "
            add("--unlisted", action="store_true", help=unlisted + "fits in the right function")
            add("--dirty", action="store_true", help="also files with uncommitted changes of yours")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Do what the command line says."""
    options = parse(argv)
    command, patches = options.command, options.patches or _own_patches(options.command)
    if command == "make":
        served = make(options.tree, patches, release=options.release, upstream=options.upstream)
        print(f"{options.tree} is served by {', '.join(served)}")
        return
    state = State(options.tree, patches)
    if command in ("status", "check"):
        print(state)
    if command != "status":
        state.require_usable(unlisted=options.unlisted, dirty=options.dirty)
    if command == "apply":
        print(f"applied: {', '.join(state.apply()) or 'nothing, all are in'}")
    if command == "revert":
        print(f"reverted: {', '.join(state.revert()) or 'nothing, none is in'}")


def _own_patches(command: str) -> Path:
    """The patch files of the checkout, or those that were installed with the package."""
    if is_checkout():
        return ROOT / "patches"
    if command == "make":
        raise LowbitError(
            "make would change an installed package: give --patches DIR, or run it "
            "in a checkout of megatron_lowbit"
        )
    return Path(__file__).parent / "patches"
