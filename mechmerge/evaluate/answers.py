"""The answers of one model to one suite: made batch by batch, kept by content, resumed after a kill.

    samples/.answers/KEY.json         all answers of (weights, prompt tokens, decoding settings)
    samples/.answers/units/KEY/*.json finished batches of what is not complete yet

The key says everything that an answer depends on, and nothing else: models of equal weights share answers whatever they are
called, and another model, template, suite or dtype never gets them. The batch is left out where answers are `exact`.
Verdicts are no part of it; they are made anew.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.artifacts import Units, digest, sha256_file, write_json
from mechmerge.behaviors.chat import chat_template_of, render, template_digest
from mechmerge.behaviors.generation import Answer, Decoder, batches, prompt_tokens
from mechmerge.errors import InputError
from mechmerge.evaluate.backends import VLLM, Engine, EngineDecoder
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.suites import Suite
from mechmerge.models.packed import kernels, load_packed
from mechmerge.models.references import Model, unchanged
from mechmerge.progress import Progress
from mechmerge.versions import versions

VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Entries of a model's config that no answer depends on."""


class Said(NamedTuple):
    """One kept answer."""

    text: str
    tokens: int
    """Generated tokens, the end token included."""
    finished: bool
    """Whether the model ended it itself."""


class SuiteAnswers(NamedTuple):
    """The answers of one model to one suite, in the order of its prompts."""

    key: str
    """sha256 of what the answers depend on."""
    template: str
    """sha256 of the chat template, or `none`."""
    answers: list[Said]


Told = Callable[[list[int], list[Said]], None]
"""Told of the places in the suite and the answers of a batch as it is finished."""


class _Asked(NamedTuple):
    """A suite as one model reads it."""

    suite: Suite
    template: str | None
    texts: list[str]
    tokens: list[list[int]]
    inputs: dict[str, Any]
    """What the answers depend on."""


class _Clock:
    """Seconds of the parts of an answering."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.generation = self.loading = 0.0

    @property
    def total(self) -> float:
        return time.perf_counter() - self.start


class Speaker:
    """A model that answers suites; its weights are loaded when the first answer is missing, and freed by `close`."""

    def __init__(
        self,
        name: str,
        model: Model,
        samples: Path,
        settings: EvaluateSettings,
        progress: Progress,
        engine: Engine = VLLM,
        load: Callable[[], Any] | None = None,
    ) -> None:
        """Loads the tokenizer.

        Args:
            name: what the model is called in messages.
            model: a resolved model.
            samples: the folder of samples; answers are kept beneath it.
            settings: how answers are generated.
            progress: told of every prompt.
            engine: what `backend: vllm` stands for.
            load: makes the weights that `model.id` names, where they do not lie in the model's folder (backend transformers).

        Raises:
            InputError: `exact` with another backend than transformers.
        """
        from mechmerge.models.load import load_tokenizer

        if settings.exact and settings.backend != "transformers":
            raise InputError("exact", expected="backend transformers", found=settings.backend)
        self.name, self.model, self.settings, self.progress, self.engine = name, model, settings, progress, engine
        self.folder, self.timings = samples / ".answers", samples.parent / "timings.jsonl"
        self.tokenizer = load_tokenizer(model.path)
        self._load = load or (lambda: load_packed(model.path, settings.dtype, settings.device))
        self.check = unchanged(model)
        """Raises where the model's files are no longer those that it answers with."""
        self._loaded: Any = None
        self._latest: _Asked | None = None

    def key(self, suite: Suite) -> str:
        """sha256 of what the answers to a suite depend on.

        Raises:
            InputError: the suite asks for a chat template that the model lacks.
            MissingError: the backend is not installed.
        """
        return digest(self._asked(suite).inputs)

    def answers(self, suite: Suite, told: Told | None = None) -> SuiteAnswers:
        """The model's answers to a suite, kept ones where there are any.

        Args:
            told: called for each batch, kept or made, in the order of the plan, once its answers are on the disk.

        Raises:
            InputError: the suite asks for a chat template that the model lacks, a prompt does not fit into its context, its
                logits are not finite, or `exact` cannot be kept.
            MissingError: the backend is not installed.
        """
        clock = _Clock()
        asked = self._asked(suite)
        plan = batches([len(ids) for ids in asked.tokens], self.settings.batch)
        path = self.folder / f"{digest(asked.inputs)[:32]}.json"
        kept = _kept(path, len(asked.texts))
        units = Units(self.folder / "units", asked.inputs, self.check)
        if kept is not None:
            answers = kept
            for rows in plan:
                _tell(told, rows, [answers[i] for i in rows])
        else:
            answers = self._make(asked, plan, units, told, clock)
            write_json(path, [list(answer) for answer in answers])
        # Also where they were kept: a call that was killed between the two steps has left them.
        units.discard()
        return SuiteAnswers(digest(asked.inputs), template_digest(asked.template), answers)

    def weights(self) -> Any:
        """The loaded weights (or the engine that holds them), which tasks of lm-eval share; loaded when first asked for."""
        if self._loaded is None:
            settings = self.settings
            if settings.backend == "transformers":
                self._loaded = self._load()
            else:
                self._loaded = self.engine.load(self.model.path, settings.dtype)
        return self._loaded

    def close(self) -> None:
        """Frees the weights."""
        self._loaded = None
        gc.collect()
        if self.settings.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------------------- parts
    def _asked(self, suite: Suite) -> _Asked:
        if self._latest is None or self._latest.suite is not suite:
            template = chat_template_of(self.tokenizer, suite.chat_template)
            texts = [render(self.tokenizer, prompt.prompt, template) for prompt in suite.prompts]
            tokens = prompt_tokens(self.tokenizer, texts, special_tokens=template is None)
            self._latest = _Asked(suite, template, texts, tokens, self._inputs(tokens, suite.answer_tokens))
        return self._latest

    def _inputs(self, tokens: list[list[int]], answer_tokens: int) -> dict[str, Any]:
        """What the answers depend on."""
        vocabulary = self.model.path / "tokenizer.json"
        settings, found = self.settings, versions()
        if settings.backend == "transformers":
            engine = [kernels(settings.dtype, settings.device), found["torch"], found["transformers"]]
        else:
            engine = [settings.backend, self.engine.version()]
        return {
            "weights": self.model.id.shards,
            "config": {k: v for k, v in self.model.checkpoint().config.items() if k not in VOLATILE},
            "prompts": digest(tokens),
            "ends": self._ends(),
            "tokenizer": sha256_file(vocabulary) if vocabulary.exists() else [type(self.tokenizer).__name__, self.model.sides],
            "answer_tokens": answer_tokens,
            "decoding": ["greedy", settings.dtype, "exact" if settings.exact else settings.batch, settings.device],
            "engine": engine,
            "format": 2,
        }

    def _ends(self) -> list[Any]:
        """End tokens of the generation config (of the config where there is none) and of the tokenizer."""
        path = self.model.path / "generation_config.json"
        config = json.loads(path.read_text("utf-8")) if path.exists() else self.model.checkpoint().config
        return [config.get("eos_token_id"), self.tokenizer.eos_token_id]

    def _decoder(self, asked: _Asked, clock: _Clock) -> Decoder | EngineDecoder:
        """What answers the suite's prompts; loads the weights where they are not loaded yet."""
        settings, suite = self.settings, asked.suite
        names = [f"{self.name}: {suite.name}: prompt {prompt.id}" for prompt in suite.prompts]
        limit = suite.answer_tokens
        start = time.perf_counter()
        weights = self.weights()
        clock.loading = time.perf_counter() - start
        if settings.backend == "transformers":
            return Decoder(
                weights,
                self.tokenizer,
                asked.tokens,
                max_new_tokens=limit,
                share_prefix=True,
                exact=settings.exact,
                names=names,
            )
        return EngineDecoder(
            weights,
            self.tokenizer,
            asked.texts,
            max_new_tokens=limit,
            ends=_flat(self._ends()),
            special_tokens=asked.template is None,
            names=names,
        )

    def _make(self, asked: _Asked, plan: Sequence[list[int]], units: Units, told: Told | None, clock: _Clock) -> list[Said]:
        decoder: Decoder | EngineDecoder | None = None
        answers: dict[int, Said] = {}
        fresh: list[Answer] = []

        def batch(rows: list[int]) -> list[list[Any]]:
            nonlocal decoder
            decoder = decoder or self._decoder(asked, clock)
            start = time.perf_counter()
            made = decoder.answers(rows)
            clock.generation += time.perf_counter() - start
            fresh.extend(made)
            return [[answer.text, answer.tokens, answer.finished] for answer in made]

        # Units of exact answers are found by the batch too, which their key leaves out.
        prefix = f"{self.settings.batch}." if self.settings.exact else ""
        self.progress.start(f"{self.name}: {asked.suite.name}", len(asked.texts))
        try:
            for number, rows in enumerate(plan):
                made = units.json(f"{prefix}{number:05}", partial(batch, rows))
                said = [Said(*answer) for answer in made]
                answers.update(zip(rows, said, strict=True))
                _tell(told, rows, said)
                self.progress.advance(len(rows))
        finally:
            self.progress.end()
        if fresh:
            self._log(asked.suite, fresh, clock)
        return [answers[i] for i in range(len(asked.texts))]

    def _log(self, suite: Suite, made: Sequence[Answer], clock: _Clock) -> None:
        """Times stand outside of every file that is digested."""
        total = clock.total
        entry = {
            "stage": f"evaluate {self.name} {suite.name}",
            "seconds": round(total, 3),
            "generation_seconds": round(clock.generation, 3),
            "loading_seconds": round(clock.loading, 3),
            "outside_seconds": round(total - clock.generation - clock.loading, 3),
            "prompts": len(made),
            "tokens": sum(answer.tokens for answer in made),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with self.timings.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")


def _kept(path: Path, count: int) -> list[Said] | None:
    """The answers that an earlier call kept; None where there are none that can be read."""
    try:
        answers = [Said(*answer) for answer in json.loads(path.read_text("utf-8"))]
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return answers if len(answers) == count else None


def _tell(told: Told | None, rows: list[int], said: list[Said]) -> None:
    if told is not None:
        told(rows, said)


def _flat(ends: Sequence[Any]) -> set[int]:
    """Ids in a list of ids, lists of ids and None."""
    parts = [end if isinstance(end, Iterable) else [end] for end in ends]
    return {int(token) for part in parts for token in part if token is not None}
