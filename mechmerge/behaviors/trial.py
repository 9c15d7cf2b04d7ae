"""Trying a model: one prompt, one answer, token by token.

The loop is that of the evaluation (`generation.Decoder`), with a batch of one: a greedy answer in float32 is the one that an
evaluation with `--exact` judges.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import Answer, Decoder, prompt_tokens
from mechmerge.behaviors.sampling import Sampler


class Trial:
    """A loaded model that answers prompts.

    Args:
        folder: a checkpoint folder.
        chat_template: `model`, `none`, or a Jinja template.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device.

    Raises:
        InputError: the tokenizer has no chat template and `model` is asked for, or an unknown device.
        CheckpointError: the model does not load.
    """

    def __init__(self, folder: Path, *, chat_template: str = "model", dtype: str = "bfloat16", device: str = "cpu") -> None:
        from mechmerge.models.load import load_tokenizer
        from mechmerge.models.packed import load_packed

        self.tokenizer = load_tokenizer(folder)
        self.template = chat_template_of(self.tokenizer, chat_template)
        self.model = load_packed(folder, dtype, device)

    def answer(
        self,
        prompt: str,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        number: int = 0,
        told: Callable[[str], None] = lambda piece: None,
    ) -> Answer:
        """The answer to one prompt.

        Args:
            prompt: the user's turn.
            max_tokens: longest answer, in tokens.
            temperature: 0 is greedy.
            seed: of the draws.
            number: the prompt's place among others: each place has draws of its own.
            told: called with every new piece of text; the pieces together are the answer's text.

        Raises:
            InputError: the prompt is empty or too long, or logits are not finite.
        """
        texts = [render(self.tokenizer, prompt, self.template)]
        prompts = prompt_tokens(self.tokenizer, texts, special_tokens=self.template is None)
        pieces = Pieces(self.tokenizer, told)
        sampler = Sampler(temperature, seed) if temperature else None
        decoder = Decoder(self.model, self.tokenizer, prompts, max_new_tokens=max_tokens, sampler=sampler, first=number)
        decoder.told = lambda _row, token: pieces.add(token)
        answer = decoder.answers([0])[0]
        pieces.end(answer.text)
        return answer


class Pieces:
    """A text that grows token by token, told in pieces that are never taken back.

    A token may be a part of a character, and decoders may change the end of a text when more follows. So what is decoded is
    told only as far as it is whole, and the rest waits for the next token, or for the end.
    """

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        self.tokenizer, self.told = tokenizer, told
        self.ids: list[int] = []
        self.said = ""

    def add(self, token: int) -> None:
        """One more token."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.startswith(self.said) and not text.endswith("\ufffd"):
            self._tell(text)

    def end(self, text: str) -> None:
        """The whole text."""
        if text.startswith(self.said):
            self._tell(text)

    def _tell(self, text: str) -> None:
        if len(text) > len(self.said):
            self.told(text[len(self.said) :])
            self.said = text
