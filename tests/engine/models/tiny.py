"""Makers of complete tiny models: random weights, and a byte-level tokenizer with a chat template."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID, IM_START_TOKEN_ID, IM_END_TOKEN_ID = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": EOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@dataclass(frozen=True)
class TinyFamily:
    config_class: type
    model_class: type
    settings: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": TinyFamily(LlamaConfig, LlamaForCausalLM),
    "llama-llama3rope": TinyFamily(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": TinyFamily(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR_ROPE}),
    "llama-bias": TinyFamily(LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "llama-untied": TinyFamily(LlamaConfig, LlamaForCausalLM, {"head_dim": 32, "num_key_value_heads": 4}),
    "mistral-swa": TinyFamily(MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": TinyFamily(Qwen2Config, Qwen2ForCausalLM),
    "qwen2-swa": TinyFamily(
        Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": TinyFamily(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "smollm2-tied": TinyFamily(LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "smollm3": TinyFamily(
        SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}
    ),
    "smollm3-swa": TinyFamily(
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"no_rope_layers": [1, 1, 0], "use_sliding_window": True, "sliding_window": 8},
    ),
}


def make_tiny(family: str, path: Path, *, max_shard_size: str = "1GB", **overrides: Any) -> PreTrainedModel:
    """Write a complete tiny model.

    Args:
        family: Key of `FAMILIES`.
        path: Folder to write to.
        max_shard_size: Smaller than the model ("50KB") to get shards and an index.
        overrides: Fields of the configuration.

    Returns:
        The transformers model in float32 that was saved.
    """
    tiny = FAMILIES[family]
    config = tiny.config_class(**{**SHAPE, **tiny.settings, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.model_class(config).float().eval()
        randomize(model)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tiny_tokenizer(path)
    return model


def randomize(model: PreTrainedModel) -> None:
    """Give every parameter values that matter: the library starts norms at 1, biases at 0 and logits near 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.2)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)


def make_tiny_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer: special tokens, 256 bytes, and a few merges of two letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(first, second) for first in "thaei" for second in "hneras"]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(first + second for first, second in merges)]
    vocab = {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(path)
    return tokenizer
