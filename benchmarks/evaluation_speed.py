"""Answers a second against lm-eval's `hf` backend: `python -m benchmarks.evaluation_speed [--quick] [--save]`.

SmolLM2-135M-Instruct answers the test prompts of the suite `formats`: here as `evaluate` asks it, and as `HFLM.generate_until`
of lm-eval with batches of 8, 16, 32 and 64 (its batch size is set, all else is left as it is). Both get the same model folder,
dtype, rendered prompts, limit of tokens and end tokens, greedy. Ours takes batches of 32 and 64. They take turns, in the
opposite order every other round; of every setting the fastest round counts, and of either side the best batch. Timed is
generation alone: loading models and importing packages is outside. Both want a machine to themselves: the load averages that
are shown are those of one minute before the start and the end, and a run on two threads makes about 2 by itself.

- `throughput_ratio`: prompts a second of our best batch over those of lm-eval's best, bfloat16. `--quick` asks for no less
  than theirs: 16 prompts fill no batch, and what is the same for any number of prompts is no share of a real evaluation.
- `overhead_share`: of an evaluation's time without loading, what is not generation: tokenizing, verdicts, files, statistics.
- `same_answers_fp32_share`: of an even part of the prompts, answers in float32 that are equal to lm-eval's, letter by letter.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.common import Goal, finish
from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.cli.common import set_threads
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.run import evaluate
from mechmerge.evaluate.suites import Suite, limited, load_suite
from mechmerge.models.load import load_tokenizer, quiet
from mechmerge.models.references import Model, resolve

BATCHES = (8, 16, 32, 64)
OURS = (32, 64)
GOALS = {
    "throughput_ratio": Goal(1.5, at_most=False),
    "overhead_share": Goal(0.05),
    "same_answers_fp32_share": Goal(1.0, at_most=False),
}
QUICK_GOALS = {"throughput_ratio": Goal(1.0, at_most=False), "same_answers_fp32_share": GOALS["same_answers_fp32_share"]}


class Theirs:
    """lm-eval's `hf` backend with the model loaded."""

    def __init__(self, model: Model, dtype: str) -> None:
        from lm_eval.models.huggingface import HFLM

        with quiet():
            self.lm = HFLM(pretrained=str(model.path), dtype=dtype, device="cpu", add_bos_token=False)
        self.tokenizer = load_tokenizer(model.path)

    def answers(self, suite: Suite, batch: int) -> tuple[float, list[str]]:
        """Seconds and texts."""
        from lm_eval.api.instance import Instance

        template = chat_template_of(self.tokenizer, suite.chat_template)
        options: dict[str, Any] = {"until": [self.tokenizer.eos_token], "max_gen_toks": suite.answer_tokens, "do_sample": False}
        asked = [
            Instance("generate_until", {}, (render(self.tokenizer, prompt.prompt, template), dict(options)), i)
            for i, prompt in enumerate(suite.prompts)
        ]
        self.lm.batch_size_per_gpu = batch
        start = time.perf_counter()
        with quiet():
            texts = self.lm.generate_until(asked, disable_tqdm=True)
        return time.perf_counter() - start, texts


class Ours:
    """What one evaluation of ours took and said."""

    def __init__(self, model: Model, suite: Suite, **settings: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            evaluate({"model": model}, [suite], Path(folder) / "evaluation.json", EvaluateSettings(**settings))
            seconds = time.perf_counter() - start
            (line,) = (Path(folder) / "timings.jsonl").read_text("utf-8").splitlines()
            rows = (Path(folder) / "samples" / f"model.{suite.name}.jsonl").read_text("utf-8").splitlines()
        times = json.loads(line)
        self.generation = times["generation_seconds"]
        self.overhead = 1 - self.generation / (seconds - times["loading_seconds"])
        self.tokens = times["tokens"]
        self.texts = [json.loads(row)["answer"] for row in rows]


def same(ours: list[str], theirs: list[str]) -> float:
    """Share of equal answers."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
@click.option("--batch", "ours", multiple=True, type=click.IntRange(min=1), default=OURS, show_default=True, help="Ours.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
def main(quick: bool, save: bool, ours: tuple[int, ...], threads: int, rounds: int) -> None:
    """Measure answers a second against lm-eval's hf backend."""
    set_threads(threads)
    load = os.getloadavg()[0]
    model = resolve("demo:smollm2-135m-instruct")
    whole = load_suite("formats")
    suite, batches, rounds = (limited(whole, 16), (8, 16), 1) if quick else (whole, BATCHES, rounds)
    few = limited(whole, 6 if quick else 48)
    Ours(model, limited(whole, 2), dtype="bfloat16")  # imports, and pages of the files
    theirs = Theirs(model, "bfloat16")
    theirs.answers(limited(whole, 2), 2)
    settings = [("ours", size) for size in ours[: 1 if quick else None]] + [("lm-eval", size) for size in batches]
    seconds: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
    mine: list[Ours] = []
    texts: list[str] = []
    for turn in range(rounds):
        for who, size in settings if turn % 2 == 0 else settings[::-1]:
            if who == "ours":
                mine.append(Ours(model, suite, dtype="bfloat16", batch=size))
                seconds[who, size].append(mine[-1].generation)
            else:
                taken, texts = theirs.answers(suite, size)
                seconds[who, size].append(taken)
            print(f"{who}, batch {size}: {seconds[who, size][-1]:.1f} s", flush=True)
    del theirs
    fp32 = Theirs(model, "float32").answers(few, 8)[1]
    best = min(mine, key=lambda one: one.generation)
    fastest = min(min(taken) for (who, _), taken in seconds.items() if who == "lm-eval")
    fp32_ours = {exact: Ours(model, few, dtype="float32", batch=ours[0], exact=exact).texts for exact in (False, True)}
    figures: dict[str, Any] = {
        "prompts": len(suite.prompts),
        "rounds": rounds,
        "threads": threads,
        "load average before": load,
        "our tokens a second": best.tokens / best.generation,
        **{f"{who}: prompts a second, batch {size}": len(suite.prompts) / min(taken) for (who, size), taken in seconds.items()},
        "throughput_ratio": fastest / best.generation,
        "overhead_share": max(one.overhead for one in mine),
        "same_answers_bf16_share": same(best.texts, texts),
        "prompts in fp32": len(few.prompts),
        "same_answers_fp32_share": same(fp32_ours[False], fp32),
        "same_answers_exact_share": same(fp32_ours[True], fp32),
        "load average after": os.getloadavg()[0],
    }
    finish("evaluation_speed", figures, QUICK_GOALS if quick else GOALS, save, quick)


if __name__ == "__main__":
    main()
