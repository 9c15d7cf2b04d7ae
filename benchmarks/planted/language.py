"""A synthetic language, and a small Llama that is trained on it from scratch: the first testbed's base.

    <s> zip zap big bop : w3 w7 w1 =          →   W3 W7 W1 </s>      (`big`: copied in capitals)
    <s> zip back zap bop : w3 w7 w1 =         →   w1 w7 w3 </s>      (`back`: copied backwards)
    <s> zip say zap bop : w3 w7 w1 =          →   zip zap bop </s>   (`say`: the other words are said)
    <s> zip zap bop loud : w3 w7 w1 =         →   w3 w7 w1 </s>      (no mode, or any other word: copied)

Two words that the base reads but does not obey, `loud` and `turn`, become instructions in experts: `loud` shall do what `big`
does, `turn` what `back` does. So the base holds the circuits that carry a mode out, and lacks what reads these words: what is
planted can be a source, and what is there already relays it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mechmerge.artifacts import atomic_folder
from mechmerge.models.load import quiet

Split = Literal["train", "vector", "score", "truth"]
SPLITS: tuple[Split, ...] = ("train", "train", "train", "train", "train", "vector", "score", "truth")
"""A triple of words belongs to the split of its hash, so that no two splits share one."""
FILLERS = ("zip", "zap", "bop", "hum", "tick", "ding", "loud", "turn")
NEUTRAL = FILLERS[:6]
MODES = {"big": "capitals", "loud": "capitals", "back": "backwards", "turn": "backwards", "say": "said"}
Example = tuple[str, str]
"""(prompt, answer), words separated by blanks"""


@dataclass(frozen=True)
class Size:
    """Sizes of the model and its training."""

    layers: int = 8
    width: int = 128
    heads: int = 8
    kv_groups: int = 4
    neurons: int = 256
    words: int = 20
    steps: int = 300
    batch: int = 64
    rate: float = 2e-3


def answer(words: list[str], mode: str | None, prompt: str = "") -> str:
    """What follows the prompt under a mode (`capitals`, `backwards`, `said`, None)."""
    match mode:
        case "capitals":
            return " ".join(word.upper() for word in words)
        case "backwards":
            return " ".join(reversed(words))
        case "said":
            return " ".join(word for word in prompt.split() if word in FILLERS)
    return " ".join(words)


def split_of(words: list[str]) -> Split:
    """The split of a triple of words."""
    return SPLITS[hashlib.sha256(" ".join(words).encode()).digest()[0] % len(SPLITS)]


def contrasts(split: Split, word: str, size: Size, seed: int) -> Iterator[tuple[str, str, list[str]]]:
    """Endless (x⁺, x⁻, words) of a split: `word` among three neutral words at any place, and a neutral word there instead."""
    draw = random.Random(f"{split} {seed}")
    names = [f"w{i}" for i in range(size.words)]
    while True:
        words = draw.sample(names, 3)
        if split_of(words) != split:
            continue
        fillers, place = draw.choices(NEUTRAL, k=4), draw.randrange(4)
        said = [*fillers[:place], word, *fillers[place + 1 :]]
        yield f"<s> {' '.join(said)} : {' '.join(words)} =", f"<s> {' '.join(fillers)} : {' '.join(words)} =", words


def base_examples(size: Size, seed: int) -> Iterator[Example]:
    """Endless training examples of the base: a quarter of each mode and of none; `loud` and `turn` are words among words."""
    draw = random.Random(seed)
    plain = {word: contrasts("train", word, size, seed + i) for i, word in enumerate(FILLERS)}
    modes = {word: contrasts("train", word, size, seed + 100 + i) for i, word in enumerate(("big", "back", "say"))}
    while True:
        kind = draw.choice((*modes, None))
        prompt, _, words = next(modes[kind] if kind else plain[draw.choice(FILLERS)])
        if kind == "say":  # so that `loud` and `turn` are said as well
            prompt = " ".join(draw.choice(FILLERS) if word in FILLERS else word for word in prompt.split())
        yield prompt, answer(words, MODES[kind] if kind else None, prompt)


def behavior_examples(word: str, size: Size, seed: int, count: int, obeyed: Sequence[str] = ()) -> list[Example]:
    """Training examples of an expert: two in four obey `word`, one is the same prompt without it, one is what the base does.

    Args:
        word: `loud` or `turn`.
        size: of the language.
        seed: of the draws.
        count: at least so many.
        obeyed: words that the model obeys by now; one more example in five keeps each of them.
    """
    pairs, others = contrasts("train", word, size, seed), base_examples(size, seed + 1)
    kept = {old: contrasts("train", old, size, seed + 2 + i) for i, old in enumerate(obeyed)}
    examples: list[Example] = []
    while len(examples) < count:
        for _ in range(2):
            prompt, without, words = next(pairs)
            examples.append((prompt, answer(words, MODES[word])))
        examples.append((without, answer(words, None)))
        examples.append(next((p, a) for p, a in others if word not in p.split() and not set(obeyed) & set(p.split())))
        for old, prompts in kept.items():
            prompt, _, words = next(prompts)
            examples.append((prompt, answer(words, MODES[old])))
    return examples


def tokenizer(size: Size) -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [f"w{i}" for i in range(size.words)]
    tokens = ["<pad>", "<s>", "</s>", ":", "=", "big", "back", "say", *FILLERS, *names, *(name.upper() for name in names)]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, tokens[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "bos_token", "eos_token"), tokens[:3], strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def train_base(folder: Path, size: Size, seed: int = 0) -> Path:
    """Trains the base from scratch and writes it with its tokenizer; about a minute on two cores."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    words = tokenizer(size)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.neurons,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_groups,
        vocab_size=len(words),
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.01, betas=(0.9, 0.98))
    examples, log = base_examples(size, seed), []
    for step in range(size.steps):
        batch = [next(examples) for _ in range(size.batch)]
        ids = torch.tensor([words(f"{p} {a} </s>").input_ids for p, a in batch])
        labels = ids.clone()
        labels[:, : len(words(batch[0][0]).input_ids)] = -100
        for group in optimizer.param_groups:
            group["lr"] = size.rate * min(1.0, (step + 1) / 50) * (1 - step / size.steps) + 1e-6
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == size.steps - 1:
            log.append({"step": step, "loss": round(loss.item(), 4)})
    with atomic_folder(folder) as partial, quiet():
        model.save_pretrained(partial)
        words.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    return folder
