"""Packaging of megatron_lowbit: nothing compiled, no hardware probed.

The C of the CPU kernels is shipped as source; `megatron_lowbit.kernels.cpu.build` compiles it at
first use, on the user's machine.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Return the version written in the package, without importing it (that would need torch)."""
    text = (ROOT / "megatron_lowbit" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('megatron_lowbit/_version.py holds no line __version__ = "..."')
    return match.group(1)


def read_readme() -> str:
    """Return README.md, or nothing in a tree that carries none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


TRITON = ["triton"]
# megatron-core imports the others without declaring them.
MEGATRON = ["megatron-core>=0.13", "einops", "psutil", "transformers", "typing_extensions", *TRITON]
CALIBRATE = ["gguf", "sentencepiece", "tqdm", "transformers"]
BENCH = ["matplotlib"]
REPORT = ["jinja2", "matplotlib"]
# What megatron-core's servers import and do not declare: the static engine's, the dynamic one's.
SERVE = ["flask", "flask-restful", "quart", "hypercorn", "pyzmq", "msgpack"]
DEV = ["hypothesis", "mypy", "openai", "pytest", "pytest-xdist", "ruff"]

# The patch files lie at the top of a checkout, where people who keep a fork look for them, and go
# into the package beside the code that applies them.
PATCHES = "megatron_lowbit.integration.patching.patches"

setup(
    name="megatron_lowbit",
    version=read_version(),
    description="Low-bit tensor-parallel communication for Megatron-core inference",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["megatron_lowbit", "megatron_lowbit.*"]), PATCHES],
    package_dir={PATCHES: "patches"},
    package_data={
        "megatron_lowbit.kernels.cpu": ["*.c", "*.h"],
        "megatron_lowbit.evaluation.report": ["*.j2"],
        PATCHES: ["*.patch", "manifest.json"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "safetensors",
        "pydantic>=2",  # checks every file that is read
        "numpy",  # safetensors.torch imports it to save a file, and does not declare it
    ],
    extras_require={
        "megatron": MEGATRON,
        "calibrate": CALIBRATE,
        "triton": TRITON,
        "bench": BENCH,
        "report": REPORT,
        "serve": SERVE,
        "dev": DEV,
    },
)
