"""Our own scores of task items at TP 3, as tools/evaluate.py --tasks takes them: JSON of rank 0.

argv: CKPT TASK,TASK,... LIMIT MEGATRON_ARGUMENTS...
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lowbit import cli
from megatron_lowbit.evaluation.measures.task_data import read_task
from megatron_lowbit.evaluation.measures.tasks import log_likelihoods, tokenize_item
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args


def main() -> None:
    load, tasks, limit, *argv = sys.argv[1:]
    args = parse_megatron_args(["--load", load, *argv])
    session.initialize(args)
    from megatron.core import parallel_state

    tokenizer = session.build_tokenizer(args, special_tokens=False)
    model = session.load_model(args)
    group = parallel_state.get_tensor_model_parallel_group()
    language_model = session.language_model(args, model, tokenizer, group=group)
    # As the harness's backend does it: the last token runs, too (in BF16 one row more rounds
    # elsewhere), and what pads the vocabulary counts as entries of it.
    alike = replace(
        language_model,
        logits=lambda tokens: language_model.logits(pad(tokens, (0, 1)))[:, :-1],
        vocab_size=args.padded_vocab_size,
    )
    scores = {}
    for task in tasks.split(","):
        items = read_task(task, limit=int(limit)).items
        requests = [tokenize_item(item, language_model) for item in items]
        # One by one, as the harness at batch size 1 does: nothing else is padded.
        scores[task] = [[log_likelihoods([one], alike)[0] for one in item] for item in requests]
    cli.say("scores " + json.dumps(scores))
    session.shutdown()


if __name__ == "__main__":
    cli.run(main)
