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

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import ROOT, is_checkout
from megatron_lowbit.integration.patching import control


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("status", "check", "apply", "revert", "make"):
        command = commands.add_parser(name)
        command.add_argument("tree", type=Path, metavar="TREE", help="holds megatron/")
        command.add_argument(
            "--patches",
            type=Path,
            metavar="DIR",
            help="folder of the patch files (default: those of this package)",
        )
        if name in ("check", "apply", "revert"):
            command.add_argument(
                "--unlisted",
                action="store_true",
                help="also a release or fork that the manifest does not list, where every patch "
                "fits in the right function",
            )
            command.add_argument(
                "--dirty", action="store_true", help="also files with uncommitted changes of yours"
            )
        if name == "make":
            command.add_argument(
                "--release", metavar="NAME", help="its name in the manifest (default: its version)"
            )
            command.add_argument(
                "--upstream",
                metavar="TEXT",
                help="where it comes from (default: git's commit, else the package of its version)",
            )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Do what the command line says."""
    options = parse(argv)
    options.patches = options.patches or _own_patches(options.command)
    if options.command == "make":
        from megatron_lowbit.integration.patching.make import make

        served = make(
            options.tree, options.patches, release=options.release, upstream=options.upstream
        )
        print(f"{options.tree} is served by {', '.join(served)}")
        return
    state = control.look(options.tree, options.patches)
    if options.command in ("status", "check"):
        print(state)
    if options.command == "status":
        return
    control.require_usable(state, unlisted=options.unlisted, dirty=options.dirty)
    if options.command == "apply":
        print(f"applied: {', '.join(control.apply(state)) or 'nothing, all are in'}")
    elif options.command == "revert":
        print(f"reverted: {', '.join(control.revert(state)) or 'nothing, none is in'}")


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
