"""The patch files under patches/: what they change, and how they are made, applied and taken out.

`edits` says what to change, once for all releases; `diffs` writes and reads the patch files;
`manifest` keeps which release each fits; `tree` looks at a Megatron; `control` is what
tools/patchctl.py does. Nothing here imports Megatron.
"""
