"""Answers of engines that lm-eval drives: vLLM, through `lm_eval.models.vllm_causallms`, as an optional extra.

Source: `LM.generate_until` (https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/api/model.py). The prompts are
rendered by us; the answer limit, greedy decoding and the end tokens are handed over. lm-eval gives back texts alone, so the
number of tokens is that of the text tokenized again, and an answer counts as finished when it is shorter than the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.behaviors.generation import Answer, check_lengths
from mechmerge.errors import MissingError


class Engine(NamedTuple):
    """A way to get an lm-eval model."""

    version: Callable[[], str]
    """What answers depend on besides the model; raises MissingError where the engine is not installed."""
    load: Callable[[Path, str], Any]
    """An `lm_eval.api.model.LM` of a model folder in a dtype."""


def _vllm_version() -> str:
    try:
        return " ".join(f"{package} {metadata.version(package)}" for package in ("vllm", "lm_eval"))
    except metadata.PackageNotFoundError:
        raise _missing("it is not installed") from None


def _load_vllm(folder: Path, dtype: str) -> Any:
    try:
        from lm_eval.models.vllm_causallms import VLLM as Model
    except ImportError as error:
        raise _missing(str(error)) from None
    return Model(pretrained=str(folder), dtype=dtype, batch_size="auto")


def _missing(found: str) -> MissingError:
    return MissingError("backend vllm", expected="the package vllm", found=found, fix="pip install 'mechmerge[vllm]'")


VLLM = Engine(_vllm_version, _load_vllm)


class EngineDecoder:
    """Greedy answers of an lm-eval model to a list of prompts, batch by batch; the twin of `generation.Decoder`."""

    def __init__(
        self,
        lm: Any,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        max_new_tokens: int,
        ends: Iterable[int],
        special_tokens: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        """Checks all prompts: lm-eval would cut one that is too long.

        Args:
            lm: an `lm_eval.api.model.LM`.
            tokenizer: the model's tokenizer.
            texts: rendered prompts.
            max_new_tokens: longest answer, in tokens.
            ends: ids of the tokens that end an answer.
            special_tokens: whether the tokenizer adds its special tokens.
            names: what errors call the prompts; by default their numbers, from 1.

        Raises:
            InputError: a prompt that is empty or too long.
        """
        self.lm, self.tokenizer, self.texts, self.limit = lm, tokenizer, texts, max_new_tokens
        self.ends = [tokenizer.decode([token]) for token in sorted(ends)]
        lm.add_bos_token = special_tokens
        names = list(names) or [f"prompt {i}" for i in range(1, len(texts) + 1)]
        lengths = [len(ids) for ids in tokenizer(list(texts), add_special_tokens=special_tokens).input_ids] if texts else []
        check_lengths(lengths, max_new_tokens, getattr(lm, "max_length", None), names)

    def answers(self, rows: Sequence[int]) -> list[Answer]:
        """Answers to the prompts of these indices."""
        from lm_eval.api.instance import Instance

        options = {"until": self.ends, "max_gen_toks": self.limit, "do_sample": False, "temperature": 0.0}
        requests = [Instance("generate_until", {}, (self.texts[row], dict(options)), place) for place, row in enumerate(rows)]
        return [self._answer(text) for text in self.lm.generate_until(requests, disable_tqdm=True)] if requests else []

    def _answer(self, text: str) -> Answer:
        # vLLM is asked to show special tokens, so that those which end an answer are seen; no other belongs to it either.
        for special in self.tokenizer.all_special_tokens:
            text = text.replace(special, "")
        ids = self.tokenizer(text, add_special_tokens=False).input_ids[: self.limit]
        return Answer(text, tuple(ids), len(ids) < self.limit)
