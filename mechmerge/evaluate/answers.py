"""The answers of one model to one suite: made batch by batch, kept by content, resumed after a kill.

    samples/.answers/KEY.json         all answers of (weights, prompt tokens, decoding settings)
    samples/.answers/units/KEY/*.json finished batches of what is not complete yet

The key says everything that an answer depends on, and nothing else: models of equal weights share answers whatever they are
called, and another model, template, suite or dtype never gets them. Verdicts are no part of it; they are made anew.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.artifacts import Units, digest, sha256_file, write_json
from mechmerge.behaviors.chat import chat_template_of, render, template_digest
from mechmerge.behaviors.generation import batches, generate_batch
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.suites import Suite
from mechmerge.models.references import Model
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


class Speaker:
    """A model that answers suites; its weights are loaded when the first answer is missing, and freed by `close`."""

    def __init__(self, name: str, model: Model, samples: Path, settings: EvaluateSettings, progress: Progress) -> None:
        from mechmerge.models.load import load_tokenizer

        self.name, self.model, self.settings, self.progress = name, model, settings, progress
        self.folder, self.timings = samples / ".answers", samples.parent / "timings.jsonl"
        self.tokenizer = load_tokenizer(model.path)
        self._loaded: Any = None

    def answers(self, suite: Suite) -> SuiteAnswers:
        """The model's answers to a suite, kept ones where there are any.

        Raises:
            InputError: the suite asks for a chat template that the model lacks, or a prompt does not fit into its context.
        """
        template = chat_template_of(self.tokenizer, suite.chat_template)
        texts = [render(self.tokenizer, prompt.prompt, template) for prompt in suite.prompts]
        tokens = self.tokenizer(texts, add_special_tokens=template is None).input_ids
        inputs = self._inputs(tokens, suite.answer_tokens)
        path = self.folder / f"{digest(inputs)[:32]}.json"
        if not path.exists():
            start = time.time()
            made = self._make(suite, texts, [len(ids) for ids in tokens], template is None, inputs)
            write_json(path, [list(answer) for answer in made])
            self._log(suite, made, time.time() - start)
            Units(self.folder / "units", inputs).discard()
        kept = json.loads(path.read_text("utf-8"))
        return SuiteAnswers(digest(inputs), template_digest(template), [Said(*answer) for answer in kept])

    def close(self) -> None:
        """Frees the weights."""
        self._loaded = None
        gc.collect()
        if self.settings.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------------------- parts
    def _inputs(self, tokens: list[list[int]], answer_tokens: int) -> dict[str, Any]:
        """What the answers depend on."""
        config = {k: v for k, v in self.model.checkpoint().config.items() if k not in VOLATILE}
        generation = self.model.path / "generation_config.json"
        ends = (
            json.loads(generation.read_text("utf-8")).get("eos_token_id") if generation.exists() else config.get("eos_token_id")
        )
        vocabulary = self.model.path / "tokenizer.json"
        found = versions()
        return {
            "weights": self.model.id.shards,
            "config": config,
            "prompts": digest(tokens),
            "ends": [ends, self.tokenizer.eos_token_id],
            "tokenizer": sha256_file(vocabulary) if vocabulary.exists() else type(self.tokenizer).__name__,
            "answer_tokens": answer_tokens,
            "decoding": ["greedy", self.settings.dtype, self.settings.batch, self.settings.device],
            "versions": [found["torch"], found["transformers"]],
            "format": 1,
        }

    def _weights(self) -> Any:
        from mechmerge.models.load import load_model

        if self._loaded is None:
            self._loaded = load_model(self.model.path, self.settings.dtype, self.settings.device)
        return self._loaded

    def _make(self, suite: Suite, texts: Sequence[str], lengths: list[int], special_tokens: bool, inputs: Any) -> list[Said]:
        units = Units(self.folder / "units", inputs)
        answers: dict[int, Said] = {}
        self.progress.start(f"{self.name}: {suite.name}", len(texts))
        try:
            for number, rows in enumerate(batches(lengths, self.settings.batch)):
                made = units.json(f"{number:05}", lambda rows=rows: self._batch(suite, texts, rows, special_tokens))  # type: ignore[misc]
                answers.update((row, Said(*answer)) for row, answer in zip(rows, made, strict=True))
                self.progress.advance(len(rows))
        finally:
            self.progress.end()
        return [answers[i] for i in range(len(texts))]

    def _batch(self, suite: Suite, texts: Sequence[str], rows: list[int], special_tokens: bool) -> list[list[Any]]:
        made = generate_batch(
            self._weights(),
            self.tokenizer,
            [texts[i] for i in rows],
            max_new_tokens=suite.answer_tokens,
            special_tokens=special_tokens,
        )
        return [[answer.text, answer.tokens, answer.finished] for answer in made]

    def _log(self, suite: Suite, made: Sequence[Said], seconds: float) -> None:
        """Times stand outside of every file that is digested."""
        entry = {
            "stage": f"evaluate {self.name} {suite.name}",
            "seconds": round(seconds, 2),
            "prompts": len(made),
            "tokens": sum(answer.tokens for answer in made),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with self.timings.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")
