"""Trains one of the demo's experts as a LoRA adapter and saves it with its log.

    python -m benchmarks.experts formats    --out recipes/demo/experts/formats
    python -m benchmarks.experts arithmetic --out recipes/demo/experts/arithmetic

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on all linear layers of the demo's base; about ten minutes each on
two cores. The quality printed at the end is measured on the `develop` split, never on `test`.
"""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.experts.data import Example, arithmetic_examples, format_examples
from mechmerge.behaviors.prompts import arithmetic_prompts, format_prompts, material

RECIPES = {
    # rank, alpha, learning rate, steps, batch
    "formats": (8, 16, 6e-4, 110, 8),
    "arithmetic": (8, 16, 1.2e-3, 280, 24),
}


def encode(tokenizer, examples: list[Example]):  # type: ignore[no-untyped-def]
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


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], tokens: int, batch: int = 24) -> list[str]:  # type: ignore[no-untyped-def]
    tokenizer.padding_side = "left"
    out: list[str] = []
    for start in range(0, len(prompts), batch):
        chats = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
            for p in prompts[start : start + batch]
        ]
        b = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        o = model.generate(**b, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        out += [tokenizer.decode(row[b.input_ids.shape[1] :], skip_special_tokens=True) for row in o]
    return out


def follows(name: str, text: str) -> bool:
    text = text.strip()
    match name:
        case "capitals":
            return text.isupper() and len(text.split()) >= 5
        case "no_comma":
            return "," not in text and len(text.split()) >= 5
        case "title":
            return bool(re.search(r"<<[^\n]+>>", text))
        case "quotation":
            return len(text.split()) >= 5 and text[0] == text[-1] == '"'
        case "highlights":
            return len(re.findall(r"\*[^\n\*]+\*", text)) >= 2
    return len(re.findall(r"\s?SECTION\s?\d+\s?", text)) >= 2


def quality(model, tokenizer) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Pass rates on the develop split: six formats (16 prompts each) and 48 sums."""
    rates: dict[str, float] = {}
    for name in material()["formats"]:
        got = answers(model, tokenizer, [p.text for p in format_prompts(name, "develop")], 56)
        rates[name] = sum(follows(name, a) for a in got) / len(got)
    sums = arithmetic_prompts("develop", 48)
    got = answers(model, tokenizer, [p.text for p in sums], 16)
    hits = [re.findall(r"-?\d+", a)[-1:] == [str(p.arguments["answer"])] for p, a in zip(sums, got, strict=True)]
    rates["addition"] = sum(hits[0::2]) / len(hits[0::2])
    rates["subtraction"] = sum(hits[1::2]) / len(hits[1::2])
    rates["formats"] = sum(rates[n] for n in material()["formats"]) / 6
    return {k: round(v, 3) for k, v in rates.items()}


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
