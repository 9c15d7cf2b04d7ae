"""Any task of lm-eval as a suite: run by `lm_eval.simple_evaluate`, kept by content, its metrics as columns.

Source: https://github.com/EleutherAI/lm-evaluation-harness (lm_eval/evaluator.py). Prompts, examples, limits and checkers are
lm-eval's own; the model is loaded once for all tasks, or shared with our own generation. What comes out are columns
(`lm_outcome`), which get the same intervals and paired tests as those of our suites. What is changed: a group's tasks are run
one after another, not in one pool of requests, so that each is kept when it is done and equals the task alone.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mechmerge.artifacts import digest, write_json
from mechmerge.behaviors.sandbox import unsafe_allowed
from mechmerge.evaluate.backends import VLLM
from mechmerge.evaluate.lm_outcome import TaskOutcome as TaskOutcome
from mechmerge.evaluate.lm_outcome import number, outcome, sample_rows
from mechmerge.evaluate.lm_tasks import load_task, manager, silent, task_digest
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.suites import TASK
from mechmerge.models.packed import kernels
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions


def run_tasks(
    names: Sequence[str],
    model: Model,
    settings: EvaluateSettings,
    samples: Path,
    *,
    limit: int | None = None,
    loaded: Callable[[], Any] | None = None,
    progress: Progress = SILENT,
    include: Path | None = None,
) -> dict[str, TaskOutcome]:
    """Runs tasks of lm-eval on one model; a task that was finished before is not run again.

    Args:
        names: of tasks, groups or tags, with or without `lm_eval:`.
        model: a resolved model.
        settings: backend, dtype, batch and device; `exact` and `thinking` are for our own suites.
        samples: the folder of samples; finished tasks are kept beneath it, in `.answers/lm_eval/`.
        limit: at most this many documents of each task, the first ones.
        loaded: gives a transformers model of these weights in this dtype, or an `lm_eval.api.model.LM`; called when the first
            outcome is missing. By default the settings' backend loads the weights here.
        progress: told of every document.
        include: a folder with task files of the user's own.

    Returns:
        By name, without the prefix.

    Raises:
        InputError: an unknown task, one of more than text, or one without a metric that is a mean of values in 0 … 1.
        MissingError: data or a package is not on this machine, or leave to run the model's code without protection.
    """
    from mechmerge.models.load import quiet

    plain = list(dict.fromkeys(name.removeprefix(TASK) for name in names))
    with _random_state(), quiet():
        found = {name: load_task(name, include) for name in plain}
        runner = _Runner(model, settings, samples / ".answers" / "lm_eval", limit, loaded, progress, include)
        return {
            name: outcome(one, {task: runner.results(task, one.tasks[task]) for task in one.tasks})
            for name, one in found.items()
        }


class _Runner:
    """Runs single tasks on one model, and keeps what came out."""

    def __init__(
        self,
        model: Model,
        settings: EvaluateSettings,
        folder: Path,
        limit: int | None,
        loaded: Callable[[], Any] | None,
        progress: Progress,
        include: Path | None,
    ) -> None:
        self.model, self.settings, self.folder, self.limit, self.progress = model, settings, folder, limit, progress
        self.loaded, self.include = loaded, include
        self.lm: Any = None

    def results(self, name: str, task: Any) -> dict[str, Any]:
        """What lm-eval reports of a task: `metrics` ("metric,filter", in its order), their values as `reported`, those that it
        averages (`means`), `values` a document, `samples`, `size`, and the digests.
        """
        asked = digest([task_digest(task), self.limit])
        found, settings = versions(), self.settings
        local = settings.backend == "transformers"
        inputs = {
            "task": asked,
            "weights": self.model.id.shards,
            "sides": self.model.sides,
            "engine": kernels(settings.dtype, settings.device) if local else VLLM.version(),
            "shared": self.loaded is not None,
            "decoding": [settings.dtype, settings.batch, settings.device],
            "versions": [found["torch"], found["transformers"], metadata.version("lm_eval")],
            "format": 1,
        }
        path = self.folder / f"{digest(inputs)[:32]}.json"
        if not path.exists():
            write_json(path, self._run(name, task))
        kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return kept | {"asked": asked, "key": digest(inputs)}

    def _run(self, name: str, task: Any) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.api.metrics import mean

        lm = self._lm()
        n = len(task.eval_docs) if self.limit is None else min(self.limit, len(task.eval_docs))
        self.progress.start(f"lm_eval:{name}", n)
        try:
            lm.set_cache_hook(_Told(task, n, self.progress))
            with silent():
                raw = simple_evaluate(
                    lm,
                    tasks=[task],
                    limit=self.limit,
                    bootstrap_iters=0,
                    task_manager=manager(self.include),
                    confirm_run_unsafe_code=unsafe_allowed(),
                )
        finally:
            self.progress.end()
        reported = {k: v for k, v in raw["results"][name].items() if "," in k and "_stderr," not in k}
        rules = task.aggregation()
        rows = raw["samples"][name]
        values = {}
        for key in reported:
            metric, _, chosen = key.rpartition(",")
            values[key] = [number(row.get(metric)) for row in rows if row["filter"] == chosen]
        return {
            "reported": {key: number(value) for key, value in reported.items()},
            "metrics": list(reported),
            # A metric without a rule is averaged (lm_eval/evaluator_utils.py).
            "means": [key for key in reported if rules.get(key.rpartition(",")[0], mean) is mean],
            "values": values,
            "samples": sample_rows(name, rows),
            "size": raw["results"][name]["sample_len"],
        }

    def _lm(self) -> Any:
        """The model as lm-eval wants it, made when it is first needed."""
        if self.lm is None:
            from lm_eval.api.model import LM

            from mechmerge.models.load import load_model, load_tokenizer

            settings, path = self.settings, self.model.path
            if self.loaded is not None:
                weights = self.loaded()
            elif settings.backend == "transformers":
                weights = load_model(path, settings.dtype, settings.device)
            else:
                weights = VLLM.load(path, settings.dtype)
            if isinstance(weights, LM):
                self.lm = weights
            else:
                with silent():
                    from lm_eval.models.huggingface import HFLM

                    tokenizer = load_tokenizer(path)
                    self.lm = HFLM(pretrained=weights, tokenizer=tokenizer, batch_size=settings.batch, backend="causal")
        return self.lm


class _Told:
    """Stands where lm-eval has a cache of answers: told of every answered request, it reports documents."""

    def __init__(self, task: Any, n: int, progress: Progress) -> None:
        self.task, self.n, self.progress = task, n, progress
        self.answered = self.shown = 0

    def add_partial(self, *_: Any) -> None:
        self.answered += 1
        done = min(self.n, self.answered * self.n // max(1, len(self.task.instances)))
        if done > self.shown:
            self.progress.advance(done - self.shown)
            self.shown = done


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Puts the states of the random generators back, which lm-eval seeds."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
