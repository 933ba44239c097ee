"""The patch files under patches/: what they change, and how they are made, applied and taken out.

`edits` says what to change, once for all releases; `patch_files` reads the patch files and their
manifest; `control` puts them into a Megatron on disk and takes them out; `make` writes them.
Nothing here imports Megatron.
"""
