"""Tiny random models with real tokenizers, written to disk in well under a second."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = (
    "Describe tea in two sentences. Use capital letters only.",
    "What is 23 plus 45? Answer with the number.",
    "Write a title and a short text about the river, the forest and the mountain.",
)


def tiny_tokenizer(vocabulary: Iterable[str] = ()) -> Any:
    """A byte-level BPE tokenizer of 320 tokens (every text can be encoded), a ChatML template, and the extra tokens given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.add_tokens(list(vocabulary))
    return fast


def _sizes(layers: int, rows: int) -> dict[str, int]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": rows,
        "max_position_embeddings": 512,
    }


def tiny_config(family: str, layers: int, rows: int, tied: bool) -> Any:
    """A transformers config of a family (its `model_type`), with grouped-query attention where the family has it."""
    import transformers

    sizes: dict[str, Any] = _sizes(layers, rows) | {"tie_word_embeddings": tied}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    match family:
        case "gpt2":
            del sizes["num_key_value_heads"], sizes["intermediate_size"], sizes["max_position_embeddings"]
            return transformers.GPT2Config(
                n_embd=sizes.pop("hidden_size"),
                n_layer=sizes.pop("num_hidden_layers"),
                n_head=sizes.pop("num_attention_heads"),
                n_positions=512,
                **sizes,
            )
        case "gpt_neox":
            del sizes["num_key_value_heads"]
            return transformers.GPTNeoXConfig(**sizes)
        case "qwen3" | "gemma2" | "gemma3_text":
            return transformers.AutoConfig.for_model(family, head_dim=8, **sizes)
        case _:
            return transformers.AutoConfig.for_model(family, **sizes)


def tiny_model(
    folder: Path,
    family: str = "llama",
    layers: int = 3,
    seed: int = 0,
    tied: bool = True,
    dtype: str = "float32",
    vocabulary: Iterable[str] = (),
    extra_rows: int = 0,
    shard_size: str = "5GB",
) -> Path:
    """Writes a random model with its tokenizer to `folder` and returns it.

    Args:
        family: a `model_type` of transformers (llama, qwen2, gpt2, gpt_neox, ...).
        vocabulary: tokens beyond the tokenizer's 320, one row each.
        extra_rows: rows of the embedding that no token has.
        shard_size: files are at most this large (`50KB` gives several shards).
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from mechmerge.models.load import quiet, torch_dtype

    tokenizer = tiny_tokenizer(vocabulary)
    config = tiny_config(family, layers, len(tokenizer) + extra_rows, tied)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(torch_dtype(dtype))
        with torch.no_grad():
            # Initial biases are 0 and norms 1: random ones, so that nothing is right by accident.
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=7)
        model.save_pretrained(folder, max_shard_size=shard_size)
        tokenizer.save_pretrained(folder)
    return folder


def tiny_expert(base: Path, folder: Path, seed: int = 1, scale: float = 0.02) -> Path:
    """Writes a copy of `base` with Gaussian noise of standard deviation `scale` on every weight, and returns its folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mechmerge.models.load import quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_((parameter.float() + noise).to(parameter.dtype))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(folder)
    return folder


def tiny_adapter(base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """Writes a random peft LoRA adapter (rank 2, all linear layers) of `base` to `folder` and returns it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from mechmerge.models.load import load_model, quiet

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
        model = get_peft_model(load_model(base), LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.05)
        model.save_pretrained(folder)
    return folder
