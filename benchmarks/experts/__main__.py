"""Trains one of the demo's experts as a LoRA adapter and saves it with its log.

    python -m benchmarks.experts formats    --out recipes/demo/experts/formats
    python -m benchmarks.experts arithmetic --out recipes/demo/experts/arithmetic

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on all linear layers of the demo's base; about ten minutes each on
two cores. The quality printed at the end is measured on the `develop` split, never on `test`. The committed adapters and their
logs were made with this script at commit 20074d8, which had checkers of its own and answered in other batches (bf16 answers
depend on those).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.experts.data import Example, arithmetic_examples, format_examples
from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import generate
from mechmerge.behaviors.prompts import material
from mechmerge.behaviors.verifiers import verify
from mechmerge.evaluate.suites import load_suite

RECIPES = {
    # rank, alpha, learning rate, steps, batch
    "formats": (8, 16, 6e-4, 110, 8),
    "arithmetic": (8, 16, 1.2e-3, 280, 24),
}


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


@click.command()
@click.argument("which", type=click.Choice(sorted(RECIPES)))
@click.option("--base", default=None, help="Folder of the base model (default: demo:smollm2-135m-instruct).")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", default=None, type=int)
@click.option("--rate", default=None, type=float)
@click.option("--threads", default=2, show_default=True)
def main(which: str, base: str | None, out: Path, seed: int, steps: int | None, rate: float | None, threads: int) -> None:
    """Train the demo's expert WHICH and save it as a bf16 LoRA adapter."""
    if base is None:
        from mechmerge.models.references import resolve

        base = str(resolve("demo:smollm2-135m-instruct").path)
    torch.manual_seed(seed)
    random.seed(seed)
    torch.set_num_threads(threads)
    rank, alpha, default_rate, default_steps, batch = RECIPES[which]
    steps, rate = steps or default_steps, rate or default_rate
    tokenizer = AutoTokenizer.from_pretrained(base)
    start = time.time()
    if which == "formats":
        half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        examples = format_examples(lambda prompts: answers(half, tokenizer, list(prompts), 48), seed)
        log = [{"base": quality(half, tokenizer), "seconds": round(time.time() - start)}]
        print(log[-1], flush=True)
        del half
    else:
        examples, log = arithmetic_examples(seed), []
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        ids, labels, mask = encode(tokenizer, [examples[(step * batch + j) % len(examples)] for j in range(batch)])
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps) + 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            log.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - start)})
            print(log[-1], flush=True)
    model.eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = "demo:smollm2-135m-instruct"
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # peft's empty card
    merged = model.merge_and_unload().to(torch.bfloat16)
    log.append({"expert": quality(merged, tokenizer), "seconds": round(time.time() - start)})
    print(log[-1], flush=True)
    settings = {"rank": rank, "alpha": alpha, "rate": rate, "steps": steps, "batch": batch, "seed": seed}
    record = {"expert": which, "settings": settings, "examples": len(examples), "log": log}
    (Path(__file__).parent / f"{which}.log.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
