"""Training of experts as LoRA adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on all linear layers of the base.

The seed is that of the order of the examples and of the adapter's first weights. The quality that is logged is measured on
the `develop` split, never on `test`.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.experts.data import (
    Example,
    arithmetic_examples,
    format_examples,
    json_examples,
    plain_arithmetic_examples,
)
from mechmerge.artifacts import atomic_folder
from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import generate
from mechmerge.behaviors.prompts import material
from mechmerge.behaviors.verifiers import verify
from mechmerge.evaluate.suites import load_suite
from mechmerge.models.load import quiet

REFERENCE = "demo:smollm2-135m-instruct"


class Recipe(NamedTuple):
    """How an expert is trained."""

    rank: int
    alpha: int
    rate: float
    """Largest learning rate of AdamW (no weight decay); ten steps warm up, then it falls linearly."""
    steps: int
    batch: int


RECIPES = {
    "formats": Recipe(8, 16, 6e-4, 110, 8),
    "arithmetic": Recipe(8, 16, 1.2e-3, 280, 24),
    "plain-arithmetic": Recipe(8, 16, 1.2e-3, 280, 24),
    "json": Recipe(8, 16, 6e-4, 110, 8),
}
ANSWERING = {"formats": format_examples, "plain-arithmetic": plain_arithmetic_examples, "json": json_examples}
"""Experts that learn from the base's own answers."""


def encode(tokenizer: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels (−100 on prompt and padding) and mask of a batch, each [examples, longest]."""
    rows = []
    for prompt, answer in examples:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        p = tokenizer(chat, add_special_tokens=False).input_ids
        a = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        rows.append((p, a))
    width = max(len(p) + len(a) for p, a in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, (p, a) in enumerate(rows):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        mask[i, : len(p) + len(a)] = 1
    return ids, labels, mask


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """Greedy answers of a model."""
    tokenizer.padding_side = "left"
    template = chat_template_of(tokenizer, "model")
    texts = [render(tokenizer, prompt, template) for prompt in prompts]
    return [answer.text for answer in generate(model, tokenizer, texts, max_new_tokens=tokens)]


def quality(model: Any, tokenizer: Any) -> dict[str, float]:
    """Pass rates on the develop split, seen wordings: the six formats and their mean, additions, subtractions."""
    rates: dict[str, float] = {}
    for name in ("formats", "arithmetic"):
        suite = load_suite(name, split="develop", tiers=("seen",))
        prompts = suite.prompts
        said = answers(model, tokenizer, [prompt.prompt for prompt in prompts], suite.answer_tokens)
        passed: dict[str, list[bool]] = {}
        for prompt, answer in zip(prompts, said, strict=True):
            (asked,) = prompt.instructions
            passed.setdefault(prompt.group, []).append(verify(asked.verifier, prompt.prompt, answer, asked.arguments))
        rates |= {group: sum(verdicts) / len(verdicts) for group, verdicts in passed.items()}
    rates["formats"] = sum(rates[name] for name in material()["formats"]) / len(material()["formats"])
    return {name: round(rate, 3) for name, rate in rates.items()}


def train(
    which: str,
    base: Path,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    rate: float | None = None,
    judged: bool = True,
) -> dict[str, Any]:
    """Trains the expert `which` and saves it as a bf16 LoRA adapter, whole or not at all; returns its log.

    Args:
        which: one of `RECIPES`.
        base: folder of the base model.
        out: folder of the adapter; what is there gives way.
        seed: of the order of examples and of the adapter's first weights.
        steps: in the place of the recipe's.
        rate: in the place of the recipe's.
        judged: whether base and expert answer the develop split.
    """
    usual = RECIPES[which]
    recipe = usual._replace(steps=usual.steps if steps is None else steps, rate=usual.rate if rate is None else rate)
    torch.manual_seed(seed)
    random.seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    start = time.time()
    log: list[dict[str, Any]] = []
    with quiet():
        if which in ANSWERING:
            half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
            examples = ANSWERING[which](partial(answers, half, tokenizer, tokens=48), seed)
            if judged:
                log.append({"base": quality(half, tokenizer), "seconds": round(time.time() - start)})
                print(log[-1], flush=True)
            del half
        else:
            examples = arithmetic_examples(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    _fit(model, tokenizer, examples, recipe, log, start)
    model.eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = REFERENCE
    _save(model, out)
    if judged:
        merged = model.merge_and_unload().to(torch.bfloat16)
        log.append({"expert": quality(merged, tokenizer), "seconds": round(time.time() - start)})
        print(log[-1], flush=True)
    return {"expert": which, "settings": recipe._asdict() | {"seed": seed}, "examples": len(examples), "log": log}


def _fit(model: Any, tokenizer: Any, examples: list[Example], recipe: Recipe, log: list[dict[str, Any]], start: float) -> None:
    """Trains the adapter's weights; examples are taken in order, again and again."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
    model.train()
    for step in range(recipe.steps):
        taken = [examples[(step * recipe.batch + j) % len(examples)] for j in range(recipe.batch)]
        ids, labels, mask = encode(tokenizer, taken)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 10) * (1 - step / recipe.steps) + 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == recipe.steps - 1:
            log.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - start)})
            print(log[-1], flush=True)


def _save(model: Any, out: Path) -> None:
    """Saves an adapter without peft's empty card, in the place of what is there."""
    shutil.rmtree(out, ignore_errors=True)
    with atomic_folder(out) as partial_folder:
        model.save_pretrained(partial_folder)
        (partial_folder / "README.md").unlink(missing_ok=True)
