"""The package as a whole: what a bare import touches, and which way imports go."""

from pathlib import Path

import pytest
from processes import printed
from test_house import imported, name_of

import megatron_lowbit
from megatron_lowbit import files

PACKAGE = Path(megatron_lowbit.__file__).parent
ROOT_BY_HAND = "Path(__file__).resolve().parents"
LAYERS = "kernels codecs comm model calibration evaluation integration benchmark".split()


def test_bare_import_touches_neither_torch_cuda_triton_nor_megatron():
    code = (
        "import sys, megatron_lowbit; dir(megatron_lowbit);"
        "print([m for m in ('torch', 'triton', 'megatron', 'transformers') if m in sys.modules])"
    )
    assert printed(code) == "[]\n"


def test_using_codecs_and_collectives_touches_neither_cuda_triton_nor_megatron():
    code = (
        "import sys, torch; before = set(sys.modules);"
        "from megatron_lowbit import all_reduce, apply, get_codec; get_codec().tables(64);"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'triton', 'megatron', 'transformers'}), torch.cuda.is_initialized())"
    )
    assert printed(code) == "[] False\n"


def test_no_module_below_counts_its_way_up_to_the_checkout():
    """A module that moves would count wrongly: `files.ROOT` is for all."""
    assert (files.ROOT / "megatron_lowbit" / "files.py").samefile(PACKAGE / "files.py")
    counting = {
        str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if ROOT_BY_HAND in p.read_text()
    }
    assert counting == {"files.py"}


def test_public_names():
    for name in megatron_lowbit.__all__:
        assert getattr(megatron_lowbit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = megatron_lowbit.nonsense


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_go_down_only(path):
    own = path.relative_to(PACKAGE).parts[0]
    for module in imported(name_of(path, PACKAGE), path):
        parts = module.split(".")
        if parts[0] == "megatron":
            assert own == "integration", f"{path} imports {module}"
        if own in LAYERS and parts[0] == "megatron_lowbit" and parts[1:2] and parts[1] in LAYERS:
            assert LAYERS.index(parts[1]) <= LAYERS.index(own), f"{path} imports {module}"
