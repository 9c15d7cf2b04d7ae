"""The steering check: pushes in one batch are pushes one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechmerge.behaviors.generation import generate
from mechmerge.behaviors.schema import Behavior, Pair, Verifier
from mechmerge.localize.asked import Asked, ask
from mechmerge.localize.bench import Bench
from mechmerge.localize.steering import Push, Steering
from mechmerge.models.references import Model
from mechmerge.progress import SILENT
from tests.test_answers import lively


@pytest.fixture
def bench(base: Model) -> Bench:
    """A model that says many things and often ends."""
    bench = Bench(base)
    lively(bench.module, 3)
    bench.module.generation_config.eos_token_id = list(range(0, bench.checkpoint.arch.vocabulary, 6))
    return bench


@pytest.fixture
def asked(bench: Bench) -> Asked:
    topics = ["tea", "rain", "a river", "the moon"]
    pairs = tuple(Pair(**{"with": f"Shout about {t}.", "without": f"Write about {t}.", "topic": t}) for t in topics)
    verifier = Verifier(name="contains", arguments={"text": "a"})
    return ask(bench, Behavior(name="loud", pairs=pairs, answer_tokens=12, verifier=verifier), pairs)


def test_pushes_in_one_batch_are_pushes_one_by_one(bench: Bench, asked: Asked, tmp_path: Path) -> None:
    v = np.random.default_rng(0).normal(size=bench.checkpoint.arch.hidden).astype(np.float32)
    pushes = [Push(1, 0 * v), Push(1, v), Push(2, 2 * v), Push(1, -v)]
    together = Steering(bench, asked, SILENT).answers(pushes)
    alone = []
    for layer, vector in pushes:

        def add(_module: Any, _inputs: Any, output: Any, vector: np.ndarray = vector) -> Any:
            x = (output[0] if isinstance(output, tuple) else output).clone()
            x[:, -1] += torch.from_numpy(vector)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = bench.layers[layer - 1].register_forward_hook(add)
        alone.append(generate(bench.module, bench.tokenizer, asked.texts, max_new_tokens=12))
        handle.remove()
    assert together == alone
    assert len({tuple(answer.ids for answer in answers) for answers in alone}) == 4, "every push changes something"
    assert len({len(answer.ids) for answers in alone for answer in answers}) > 3, "rows close up at different times"
    plain = [answer.ids for answer in generate(bench.module, bench.tokenizer, asked.texts, max_new_tokens=12)]
    assert [answer.ids for answer in together[0]] == plain, "nothing is left on the model"


def test_rates_are_shares_of_verdicts(bench: Bench, asked: Asked) -> None:
    v = np.random.default_rng(0).normal(size=bench.checkpoint.arch.hidden).astype(np.float32)
    steering = Steering(bench, asked, SILENT)
    pushes = [Push(2, v * strength) for strength in (0.0, 1.0, 2.0)]
    expected = [np.mean(["a" in answer.text for answer in answers]) for answers in steering.answers(pushes)]
    assert steering.rates(pushes) == expected
    assert len(set(expected)) > 1
