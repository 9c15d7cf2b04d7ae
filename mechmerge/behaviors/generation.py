"""Greedy answers in fixed batches.

The unit of work is a batch: in bf16 an answer depends on the other prompts of its batch, so `batches` is a pure function of
the lengths and a batch is made whole or not at all. Greedy means the plain argmax: penalties that a model's
generation_config.json may ask for are left out, so that all models are decoded alike. An answer ends at any end token of the
generation config or of the tokenizer. In fp32 the answers equal those of `transformers.generate` with `do_sample=False`
(a test says so); the loop is our own because rows that are done leave the batch, and only the last position's logits are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mechmerge.errors import InputError
from mechmerge.progress import SILENT, Progress


class Answer(NamedTuple):
    """What a model said to one prompt."""

    text: str
    """The decoded answer, without special tokens."""
    ids: tuple[int, ...]
    """The generated token ids, without the end token."""
    finished: bool
    """Whether the model ended the answer itself (otherwise the limit of tokens did)."""
    end: int | None = None
    """The end token that it said, which may be another one than the tokenizer's own; None where it did not end."""

    @property
    def tokens(self) -> int:
        """Number of generated tokens, the end token included."""
        return len(self.ids) + self.finished


def batches(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Indices of the prompts in batches of at most `batch`, short prompts first (ties in input order)."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def prompt_lengths(tokenizer: Any, texts: Sequence[str], special_tokens: bool = False) -> list[int]:
    """Number of tokens of each rendered prompt."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=special_tokens).input_ids] if texts else []


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the generation config's (one or a list) and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, Iterable) else {configured}
    return {int(token) for token in ends | {tokenizer.eos_token_id} if token is not None}


def generate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch: int = 24,
    special_tokens: bool = False,
    progress: Progress = SILENT,
    label: str = "generate",
) -> list[Answer]:
    """Greedy answers to rendered prompts, in their order.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer, padding on the left, with a padding token.
        texts: rendered prompts (see `chat.render`).
        max_new_tokens: longest answer, in tokens.
        batch: prompts a batch.
        special_tokens: whether the tokenizer adds its special tokens (right only without a chat template).
        progress: told of every prompt done, under `label`.

    Raises:
        InputError: a prompt with its answer does not fit into the model's context.
    """
    answers: dict[int, Answer] = {}
    progress.start(label, len(texts))
    try:
        for rows in batches(prompt_lengths(tokenizer, texts, special_tokens), batch):
            part = [texts[i] for i in rows]
            made = generate_batch(model, tokenizer, part, max_new_tokens=max_new_tokens, special_tokens=special_tokens)
            answers.update(zip(rows, made, strict=True))
            progress.advance(len(rows))
    finally:
        progress.end()
    return [answers[i] for i in range(len(texts))]


def generate_batch(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_new_tokens: int, special_tokens: bool = False
) -> list[Answer]:
    """Greedy answers to one batch of rendered prompts; see `generate`."""
    import torch

    encoded = tokenizer(list(texts), add_special_tokens=special_tokens, padding=True, return_tensors="pt").to(model.device)
    _check_context(model, encoded.input_ids.shape[1] + max_new_tokens)
    with torch.no_grad():
        rows = _greedy(model, encoded.input_ids, encoded.attention_mask, end_tokens(model, tokenizer), max_new_tokens)
    decoded = tokenizer.batch_decode([ids for ids, _ in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [Answer(text, tuple(ids), end is not None, end) for text, (ids, end) in zip(decoded, rows, strict=True)]


def _check_context(model: Any, length: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(
            "prompt",
            expected=f"at most {limit} tokens with the answer",
            found=str(length),
            fix="shorten it, or lower answer_tokens",
        )


def _greedy(model: Any, ids: Any, mask: Any, ends: set[int], limit: int) -> list[tuple[list[int], int | None]]:
    """(token ids without the end token, the end token if it was said) of each row.

    ids and mask are [rows, length], padded on the left.
    """
    import torch
    from transformers import DynamicCache

    said: list[list[int]] = [[] for _ in ids]
    ended: list[int | None] = [None] * len(said)
    place = list(range(len(said)))  # row of the batch as it is now -> row as it was given
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for step in range(limit):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        ids = logits[:, -1:].argmax(-1)
        for i, token in zip(place, ids[:, 0].tolist(), strict=True):
            ended[i] = token if token in ends else None
            if ended[i] is None:
                said[i].append(token)
        stay = [row for row, i in enumerate(place) if ended[i] is None]
        if not stay or step == limit - 1:
            break
        mask, positions = torch.cat([mask, mask.new_ones(len(place), 1)], -1), positions[:, -1:] + 1
        if len(stay) < len(place):
            kept = torch.tensor(stay, device=ids.device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            place = [place[row] for row in stay]
    return list(zip(said, ended, strict=True))
