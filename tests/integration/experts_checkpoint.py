"""Save a random model of 4 layers with experts: experts_checkpoint.py DIRECTORY TOKENIZER."""

import sys
from pathlib import Path

FLAGS = (
    "--num-layers 4 --hidden-size 48 --num-attention-heads 4 --ffn-hidden-size 64 --swiglu --bf16 "
    "--seq-length 64 --max-position-embeddings 128 --position-embedding-type rope "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--vocab-size 1000 --init-method-std 0.3 --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 32 "
    "--moe-shared-expert-intermediate-size 32 --moe-token-dispatcher-type alltoall "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"
)


def main() -> None:
    from megatron_lowbit.integration.runtime import session
    from megatron_lowbit.integration.runtime.checkpoint import TRACKER
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

    directory, tokenizer = Path(sys.argv[1]), sys.argv[2]
    args = parse_megatron_args([*FLAGS.split(), tokenizer])
    session.initialize(args)
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    model = unwrap_model(session.load_model(args)).sharded_state_dict()
    (directory / "release").mkdir(parents=True)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}
    dist_checkpointing.save(state, str(directory / "release"))
    (directory / TRACKER).write_text("release")
    session.shutdown()


if __name__ == "__main__":
    main()
