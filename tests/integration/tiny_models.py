"""Small random models of the families beside Llama, for tests to convert."""

import json
import sys
from pathlib import Path

import tiny_tokenizers
import transformers
from releases import run
from tiny_llama import SHAPE, hugging_face_model, save_random

# By name: the configuration's class, and what is special. Windows are shorter than the tests'
# sequences; heads are not hidden / heads wide, and 3 ranks can share them.
MODELS = {
    "mistral": (transformers.MistralConfig, dict(head_dim=12, sliding_window=16)),
    "qwen2": (
        transformers.Qwen2Config,
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen2-tied": (transformers.Qwen2Config, dict(tie_word_embeddings=True, max_window_layers=2)),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=10, tie_word_embeddings=True)),
    # As in Gemma 2B: one KV head for all ranks.
    "gemma": (transformers.GemmaConfig, dict(head_dim=12, num_key_value_heads=1)),
    "gemma-untied": (transformers.GemmaConfig, dict(head_dim=6, tie_word_embeddings=False)),
}


_TOKENIZERS = {"gemma": tiny_tokenizers.gemma, "qwen2": tiny_tokenizers.qwen}


def hugging_face_models(directory: Path) -> None:
    """Saves one of each under its name in `directory`."""
    for name, (config, special) in MODELS.items():
        save_random(config(**{**SHAPE, **special}), directory / name)
        if name in _TOKENIZERS:
            tiny_tokenizers.save(_TOKENIZERS[name], directory / name)


def save_llama(directory: Path, **settings) -> None:
    """A Llama, by a process that is no rank: of several ranks most save nothing."""
    run(sys.executable, __file__, directory, json.dumps(settings))


if __name__ == "__main__":
    hugging_face_model(Path(sys.argv[1]), **json.loads(sys.argv[2]))
