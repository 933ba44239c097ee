"""The patch files under patches/: what they change, and how they are made, applied and taken out.

`edits` says what to change, once for all releases; `patch_files` reads the patch files and their
manifest; `tree` is a Megatron on disk; `control` puts patches in and takes them out; `make` writes
patch files. Nothing here imports Megatron.
"""
