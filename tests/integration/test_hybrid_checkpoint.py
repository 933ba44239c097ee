"""A HybridModel's checkpoint in the tools: saved, calibrated and loaded."""

import pytest
import torch
from random_checkpoint import save
from small_gpt import ATTENTION, MLP, SHARED_EXPERTS

from megatron_lowbit.calibration.index_files import read_index
from megatron_lowbit.integration.loops import calibrate_command
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

MODEL = (
    "--hybrid-layer-pattern *-*E --hidden-size 48 --num-attention-heads 4 --swiglu --bf16 "
    "--seq-length 64 --max-position-embeddings 64 --position-embedding-type rope "
    "--normalization RMSNorm --disable-bias-linear --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 "
    "--moe-token-dispatcher-type allgather --tokenizer-type NullTokenizer --vocab-size 60"
)
POINTS = {1: [ATTENTION], 2: [MLP], 3: [ATTENTION], 4: [SHARED_EXPERTS]}


@pytest.mark.on_ranks(1)
def test_a_hybrid_models_checkpoint(tmp_path):
    """It has the names that Transformer Engine's layers have."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    weights = save(tmp_path / "ckpt", *MODEL.split()).state_dict()
    assert {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
    } <= load_tensors_metadata(str(tmp_path / "ckpt" / "release")).keys()
    numbers = tmp_path / "numbers.txt"
    numbers.write_text(" ".join(str(n * n % 59) for n in range(400)))
    data = ["--load", str(tmp_path / "ckpt"), "--data", str(numbers), "--simulate-tp", "2"]
    calibrate_command.main([*data, "--sequences", "4", "--seq-length", "16", "--budget", "4"])
    index = read_index(tmp_path / "ckpt" / "lowbit")
    assert {layer: sorted(points) for layer, points in index.layers.items()} == POINTS
    assert set(index.recipe) == {(layer, name) for layer, (name,) in POINTS.items()}
    args = parse_megatron_args(["--load", str(tmp_path / "ckpt")])
    session.initialize(args)
    found = session.load_model(args).state_dict()
    named = {name: weight for name, weight in weights.items() if weight is not None}
    assert all(torch.equal(found[name], weight) for name, weight in named.items())
