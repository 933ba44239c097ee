"""A small random Llama in Hugging Face form, with a tokenizer, for tests to convert."""

from pathlib import Path

import torch
import transformers

VOCABULARY = 1000
SHAPE = dict(
    num_hidden_layers=2,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=96,
    vocab_size=VOCABULARY,
    max_position_embeddings=16384,
    rms_norm_eps=3e-5,
    initializer_range=0.3,  # makes attention sharp, so that a wrong rotary table shows
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=20000.0,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def hugging_face_model(directory: Path, **settings) -> transformers.LlamaForCausalLM:
    """Saves a random Llama with a tokenizer and returns it."""
    return save_random(transformers.LlamaConfig(**{**SHAPE, **settings}), directory)


def save_random(config: transformers.PreTrainedConfig, directory: Path):
    """Saves a random model of `config` with a tokenizer and returns it."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        # All ones (Gemma's are zeros) would hide a norm or a bias that went to the wrong place.
        if "norm" in name or name.endswith("bias"):
            parameter.data += torch.empty_like(parameter).uniform_(-0.5, 0.5)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return model


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
