"""Patching every head below an anchor: `python -m benchmarks.patching [--quick] [--save]`.

The job: on the demo's pair, put the expert's weights of each of the nine heads of each layer below layer 20 into the base,
alone, run 12 prompts of a built-in behaviour (rendered with the chat template), and read the state at the last prompt token.
It is done by

- *ours*: `localize.patching.Patcher`, all heads, with the base's own pass and everything else behind loading the model;
- *whole model*: weights swapped on the same bench, the transformers model called as a user would, language head included;
- *stopped*, *resumed*: the same without what lies above the anchor, and without what lies below the head either, one head at
  a time (where our ratio comes from);
- *prompt by prompt*: stopped, every prompt alone and unpadded (how far rounding by itself moves scores);
- *nnsight* and *TransformerLens* (benchmarks/rivals): the weights swapped in place, all prompts in one pass, in the variants
  that the tool offers: the whole model, an early stop, and for nnsight skipping the layers below. The fastest one counts.

All get the same token ids, masks, positions, dtype (fp32) and threads, take turns in every round (every other round in the
opposite order), and are compared by seconds a head: ours over all heads, the whole model over an even part of them (all of
them over the rounds), the others over a smaller even part. A ratio is the median over rounds of their seconds over ours in
the same round.

`--quick` takes few heads, which puts us at a disadvantage: the base's own pass is spread over a tenth of the heads.

The tools are optional: `pip install -c constraints.txt -e ".[rivals]"` puts both beside us. Where they are in another
environment, `--nnsight-python` and `--transformerlens-python` name its interpreter, which need not have us. A
tool that is not there is left out; its goal is missed then.

- `ratio_whole_model`, `ratio_nnsight`, `ratio_transformerlens`: see above.
- `max_difference`: largest |ours − whole model| of a head's score, which is its recovery: the change of the state, the mean
  over prompts, over the gap between expert and base. `score difference, …` is the same for the others, over the heads that they
  did, and `state difference, …` the largest one of a single prompt's state, as a share of that state.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.common import Goal, finish
from benchmarks.rivals.job import Job, timed
from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.schema import load_behavior
from mechmerge.cli.common import set_threads
from mechmerge.localize.bench import Batch, Bench, hooked
from mechmerge.localize.measure import Anchor
from mechmerge.localize.patching import Patcher
from mechmerge.models.components import Component
from mechmerge.models.references import resolve

EXPERT = Path(__file__).parent.parent / "recipes" / "demo" / "experts" / "formats"
BEHAVIOR = "sections"
PROMPTS, ANCHOR = 12, 20
QUICK_LAYERS = (4, 15)
"""As deep in the mean as all layers below the anchor, which the cost of a head depends on."""
SAME = 1e-4
"""Largest difference of a reference's score that rounding explains; heads change scores by .002 … .02."""
TOOLS = {"nnsight": "nnsight", "transformerlens": "transformer_lens"}
"""Our name of a tool, and the module that is imported."""
GOALS = {
    "ratio_whole_model": Goal(5, at_most=False),
    "ratio_nnsight": Goal(5, at_most=False),
    "ratio_transformerlens": Goal(5, at_most=False),
    "max_difference": Goal(1e-5),
}
Heads = Sequence[tuple[int, int]]
Contender = Callable[[Heads], tuple[float, np.ndarray]]
"""(layer, head) pairs → seconds, and states [heads, n]."""


class Pair:
    """The demo's base on a bench, the expert's weights in memory, and the job."""

    def __init__(self, threads: int) -> None:
        base = resolve("demo:smollm2-135m-instruct")
        expert = resolve(f"demo:smollm2-135m-instruct+{EXPERT}")
        self.bench, theirs = Bench(base), expert.checkpoint()
        arch, tokenizer = self.bench.checkpoint.arch, self.bench.tokenizer
        pairs, template = load_behavior(BEHAVIOR).pairs[:PROMPTS], chat_template_of(self.bench.tokenizer, "model")
        texts = [[render(tokenizer, text, template) for text in (pair.with_, pair.without)] for pair in pairs]
        self.ids = [tokenizer(with_, add_special_tokens=False).input_ids for with_, _ in texts]
        self.batch, plain = (self.bench.encode(column) for column in zip(*texts, strict=True))
        names = {b.tensor for layer in range(ANCHOR) for b in self.bench.checkpoint.layout.blocks(layer, "head")}
        self.weights = {name: theirs.tensor(name) for name in names}

        start = self.bench.run(self.batch, ANCHOR)[:, -1]
        self.bench.load(theirs)
        end, without = (self.bench.run(batch, ANCHOR)[:, -1] for batch in (self.batch, plain))
        self.bench.load(self.bench.checkpoint)
        v = (end - without).mean(0)
        self.anchor = Anchor(ANCHOR, v / v.norm())
        self.start = self.anchor.read(start[:, None]).double().numpy()
        """The base's state, [n]."""
        self.gap = float((end - start).mean(0) @ self.anchor.vector)
        """s(expert) − s(base), the mean over prompts."""
        self.heads = [(layer, head) for layer in range(ANCHOR) for head in range(arch.heads)]
        self.job = Job(
            str(base.path),
            str(expert.path),
            ANCHOR,
            arch.head_dim,
            threads,
            self.batch.ids,
            self.batch.mask,
            self.anchor.vector,
        )

    def contenders(self) -> dict[str, Contender]:
        """Those that run in this process: the bench's own plain ways, and ours."""
        bench, batch = self.bench, self.batch
        trace = bench.trace(batch, ANCHOR)
        alone = [Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)) for ids in self.ids]

        def one_by_one(measure: Callable[[int], torch.Tensor]) -> Contender:
            def swapped(layer: int, head: int) -> torch.Tensor:
                blocks = bench.checkpoint.layout.component_blocks(Component(layer, "head", head))
                with bench.patched(blocks, self.weights.__getitem__):
                    return measure(layer)[:, -1]

            return lambda heads: timed(swapped, heads, self.anchor.vector)

        return {
            "ours": self.ours,
            "whole model": one_by_one(lambda _: whole(bench, batch)),
            "stopped": one_by_one(lambda _: bench.run(batch, ANCHOR)),
            "resumed": one_by_one(lambda layer: bench.resume(trace, layer)),
            "prompt by prompt": one_by_one(lambda _: torch.cat([bench.run(prompt, ANCHOR)[:, -1:] for prompt in alone])),
        }

    def ours(self, heads: Heads) -> tuple[float, np.ndarray]:
        """The engine, from token ids to states."""
        start = time.perf_counter()
        patcher = Patcher(self.bench, self.ids, self.anchor)
        run = patcher.run()
        found = patcher.patch(run, [Component(layer, "head", head) for layer, head in heads], self.weights.__getitem__)
        return time.perf_counter() - start, self.start + np.stack(list(found.values()))


def whole(bench: Bench, batch: Batch) -> torch.Tensor:
    """The residual stream at the anchor, [n, T, D], of a forward pass through everything."""
    found: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with hooked(bench.layers[ANCHOR - 1].register_forward_hook(keep)):
        bench.module(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions)
    return found[0]


class Tool:
    """Another tool in a process of its own (benchmarks/rivals/job.py)."""

    def __init__(self, name: str, python: str, job: Job, folder: Path) -> None:
        self.name, self.states, self.errors = name, folder / f"{name}.npy", folder / f"{name}.err"
        job.save(folder / "job.npz")
        threads = {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", f"benchmarks.rivals.{name}_job", str(folder / "job.npz")],
                cwd=Path(__file__).parent.parent, env=os.environ | threads, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        ready = self._answer()
        self.variants, self.versions = ready["variants"], ready["versions"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}: {self.errors.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def contender(self, variant: str) -> Contender:
        """One way in which the tool does the job."""

        def measure(heads: Heads) -> tuple[float, np.ndarray]:
            assert self.process.stdin is not None
            asked = {"variant": variant, "heads": heads, "states": str(self.states)}
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            return self._answer()["seconds"], np.load(self.states)

        return measure

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def tools(pythons: dict[str, str | None], job: Job) -> Iterator[dict[str, Tool]]:
    """The tools that can be had, running."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {}
        for name, python in pythons.items():
            if python is None and importlib.util.find_spec(TOOLS[name]) is None:
                print(f"{name} is left out: not importable here, and no --{name}-python", file=sys.stderr)
                continue
            running[name] = Tool(name, python or sys.executable, job, folder)
            stack.callback(running[name].close)
        yield running


def spread(heads: Heads, count: int, turn: float) -> Heads:
    """`count` of the heads, evenly spread; `turn` in 0 … 1 shifts them, .5 is centred."""
    step = len(heads) / count
    return [heads[int((i + turn) * step)] for i in range(count)]


@click.command()
@click.option("--quick", is_flag=True, help="Two of the layers, one round, few heads a reference.")
@click.option("--save", is_flag=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--few", type=click.IntRange(min=1), default=9, show_default=True, help="Heads a round and slower reference.")
@click.option("--nnsight-python", help="Interpreter that has nnsight (default: this one).")
@click.option("--transformerlens-python", help="Interpreter that has TransformerLens (default: this one).")
@torch.no_grad()
def main(
    quick: bool,
    save: bool,
    threads: int,
    rounds: int,
    few: int,
    nnsight_python: str | None,
    transformerlens_python: str | None,
) -> None:
    """Measure patching of every head against whole models, nnsight and TransformerLens."""
    set_threads(threads)
    pair = Pair(threads)
    heads = [(layer, head) for layer, head in pair.heads if layer in QUICK_LAYERS] if quick else pair.heads
    rounds, few = (1, 2) if quick else (rounds, few)
    pythons = {"nnsight": nnsight_python, "transformerlens": transformerlens_python}
    with tools(pythons, pair.job) as running:
        contenders = pair.contenders()
        for name, tool in running.items():
            contenders |= {f"{name} {variant}": tool.contender(variant) for variant in tool.variants}
        for contender in contenders.values():
            contender(heads[:1])  # memory and caches
        per_head: dict[str, list[float]] = {name: [] for name in contenders}
        states: dict[str, dict[tuple[int, int], np.ndarray]] = {name: {} for name in contenders}
        for turn in range(rounds):
            part = spread(heads, few, (turn + 0.5) / rounds)
            parts = {"ours": heads, "whole model": part if quick else heads[turn::rounds]}
            for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
                asked = parts.get(name, part)
                seconds, found = contenders[name](asked)
                per_head[name].append(seconds / len(asked))
                states[name] |= dict(zip(asked, found, strict=True))

    ratios = {
        name: statistics.median(theirs / ours for theirs, ours in zip(taken, per_head["ours"], strict=True))
        for name, taken in per_head.items()
    }

    def apart(name: str) -> tuple[float, float]:
        """Largest difference of a score, and of a state as a share of it, from the whole model's, where both did the head."""
        both = [head for head in states[name] if head in states["whole model"]]
        mine, theirs = (np.stack([states[key][head] for head in both]) for key in (name, "whole model"))
        score, state = np.abs((mine - theirs).mean(1) / pair.gap), np.abs((mine - theirs) / theirs)
        return float(score.max()), float(state.max())

    figures: dict[str, Any] = {
        "heads": len(heads),
        "prompts": PROMPTS,
        "tokens": int(pair.batch.mask.sum()),
        "anchor layer": ANCHOR,
        "rounds": rounds,
        "threads": threads,
        "heads a round, whole model": few if quick else len(heads) // rounds,
        "heads a round, others": few,
        "gap of the state, expert - base": pair.gap,
        **{f"ms a head, {name}": statistics.median(taken) * 1e3 for name, taken in per_head.items()},
        **{f"ratio, {name}": ratio for name, ratio in ratios.items() if name != "ours"},
        "ratio_whole_model": ratios["whole model"],
    }
    for own, tool in running.items():
        figures[f"ratio_{own}"] = min(ratio for name, ratio in ratios.items() if name.startswith(own))
        figures[f"versions, {own}"] = tool.versions
    figures["max_difference"] = apart("ours")[0]
    for name in contenders:
        if name != "whole model":
            score, state = apart(name)
            figures |= {f"score difference, {name}": score, f"state difference, {name}": state}
            if name != "ours" and score > SAME:
                raise RuntimeError(f"{name} did another job: a score differs by {score:.2g} from the whole model's")
    finish("patching", figures, GOALS, save, quick)


if __name__ == "__main__":
    main()
