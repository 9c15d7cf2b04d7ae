"""Greedy answers in fixed batches.

The unit of work is a batch: in bf16 an answer depends on the other prompts of its batch, so `batches` is a pure function of
the lengths and a batch is made whole or not at all. Greedy means the plain argmax: penalties that a model's
generation_config.json may ask for are left out, so that all models are decoded alike. An answer ends at any end token of the
generation config or of the tokenizer. In fp32 the answers equal those of `transformers.generate` with `do_sample=False`
(a test says so); the loop is our own because rows that are done leave the batch, the tokens that all prompts begin with are
computed once (`share_prefix`), the cache grows in place (kv_cache.py), and only the last position's logits are made.

`exact` makes fp32 answers independent of the batches. Logits of one text differ between batches by rounding, so its argmax
may differ wherever two tokens are nearly tied. There (the first two closer than `MARGIN` times the largest logit) the token
is taken from the text alone in one forward pass, without batch, padding or cache. As long as batching moves no logit by more
than half the margin, every token is thereby the argmax of the lone text: a token outside the margin is its argmax as well. That
premise is checked at every near tie, and broken, it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mechmerge.errors import InputError
from mechmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from mechmerge.behaviors.sampling import Sampler

MARGIN = 2.0**-14
"""Two logits are nearly tied when closer than this share of the row's largest absolute logit: one token of SmolLM2-135M in a
thousand. Half of it is twelve times the largest difference that its batches were seen to make (2.5e-6)."""
SHORTEST_PREFIX = 4
"""Tokens below which a shared prefix is not worth a forward pass of its own."""


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


def prompt_tokens(tokenizer: Any, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each rendered prompt."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=special_tokens).input_ids] if texts else []


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
    share_prefix: bool = False,
    exact: bool = False,
    progress: Progress = SILENT,
    label: str = "generate",
) -> list[Answer]:
    """Greedy answers to rendered prompts, in their order.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer.
        texts: rendered prompts (see `chat.render`).
        max_new_tokens: longest answer, in tokens.
        batch: prompts a batch.
        special_tokens: whether the tokenizer adds its special tokens (right only without a chat template).
        share_prefix: compute the tokens that all prompts begin with once. Not for a model with hooks on it, which would see
            the prefix as a text of its own.
        exact: answers that do not depend on `batch`; needs a model in float32.
        progress: told of every prompt done, under `label`.

    Raises:
        InputError: a prompt with its answer does not fit into the model's context or has no tokens, logits are not finite,
            or `exact` cannot be kept.
    """
    prompts = prompt_tokens(tokenizer, texts, special_tokens)
    decoder = Decoder(model, tokenizer, prompts, max_new_tokens=max_new_tokens, share_prefix=share_prefix, exact=exact)
    answers: dict[int, Answer] = {}
    progress.start(label, len(texts))
    try:
        for rows in batches([len(ids) for ids in prompts], batch):
            answers.update(zip(rows, decoder.answers(rows), strict=True))
            progress.advance(len(rows))
    finally:
        progress.end()
    return [answers[i] for i in range(len(texts))]


class Decoder:
    """Greedy answers of one model to a list of prompts, batch by batch."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        share_prefix: bool = False,
        exact: bool = False,
        names: Sequence[str] = (),
        sampler: Sampler | None = None,
        first: int = 0,
    ) -> None:
        """Checks all prompts before any answer is made.

        Args:
            prompts: token ids of all prompts (see `prompt_tokens`).
            names: what errors call the prompts; by default their numbers, from 1.
            sampler: draws tokens in the place of the argmax (not with `exact`).
            first: number of the first prompt among the sampler's.
            max_new_tokens, share_prefix, exact: see `generate`.

        Raises:
            InputError: a prompt that is empty or too long, or `exact` with a model that is not in float32.
        """
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.limit, self.exact, self.ends = max_new_tokens, exact, end_tokens(model, tokenizer)
        self.names = list(names) or [f"prompt {i}" for i in range(1, len(prompts) + 1)]
        if exact and str(model.dtype) != "torch.float32":
            raise InputError("exact", expected="a model in float32", found=str(model.dtype).removeprefix("torch."))
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        check_lengths([len(ids) for ids in prompts], max_new_tokens, context, self.names)
        self.shared = self._common() if share_prefix else 0
        """Tokens that all prompts begin with and that are computed once."""
        self.sampler, self.first = sampler, first
        self.told: Callable[[int, int], None] = lambda row, token: None
        """Told of every token of an answer as it is said, with its prompt's index; not of end tokens."""
        self.now: list[int] = []
        """The index of the prompt in each row of the batch that runs: rows close up as answers end."""
        self._states: Any = None

    def answers(self, rows: Sequence[int]) -> list[Answer]:
        """Answers to the prompts of these indices, as one batch.

        Raises:
            InputError: logits are not finite, or `exact` cannot be kept.
        """
        import torch

        if not rows:
            return []
        with torch.inference_mode():
            made = self._greedy(rows)
        texts = self.tokenizer.batch_decode(
            [ids for ids, _ in made], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [Answer(text, tuple(ids), end is not None, end) for text, (ids, end) in zip(texts, made, strict=True)]

    def _common(self) -> int:
        """Length of the prefix to share; 0 for none. At least one token of every prompt is left behind it."""
        from mechmerge.behaviors.kv_cache import shareable

        if len(self.prompts) < 2:
            return 0
        # In dictionary order what the first and the last of all begin with, all begin with.
        first, last = min(map(list, self.prompts)), max(map(list, self.prompts))
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
        lengths = [len(ids) for ids in self.prompts]
        common = min(common, min(lengths) - 1)
        return common if common >= SHORTEST_PREFIX and shareable(self.model.config, max(lengths) + self.limit) else 0

    # ------------------------------------------------------------------------------------------------------------ decoding
    def _greedy(self, rows: Sequence[int]) -> list[tuple[list[int], int | None]]:
        """(token ids without the end token, the end token if it was said) of each row."""
        from mechmerge.behaviors.kv_cache import begin, closing_up, new_cache, prefix_states

        said: list[list[int]] = [[] for _ in rows]
        ended: list[int | None] = [None] * len(rows)
        place = list(range(len(rows)))  # row of the batch as it is now -> row as it was given
        ids, mask, positions = self._padded(rows)
        length = self.shared + ids.shape[1]
        cache = new_cache(self.model.config, length + self.limit - 1)
        if self.shared:
            self._states = self._states or prefix_states(self.model, self.prompts[0][: self.shared])
            begin(cache, self._states, len(rows))
        for step in range(self.limit):
            self.now = [rows[i] for i in place]
            logits = self.model(
                input_ids=ids,
                attention_mask=mask[:, :length],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            ids = self._tokens(logits, [(rows[i], said[i]) for i in place])
            for i, token in zip(place, ids[:, 0].tolist(), strict=True):
                ended[i] = token if token in self.ends else None
                if ended[i] is None:
                    said[i].append(token)
                    self.told(rows[i], token)
            stay = [row for row, i in enumerate(place) if ended[i] is None]
            if not stay or step == self.limit - 1:
                break
            length, positions = length + 1, positions[:, -1:] + 1
            if len(stay) < len(place):
                order = closing_up(stay)
                kept = ids.new_tensor(order)
                cache.batch_select_indices(kept)
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
                place = [place[row] for row in order]
        return list(zip(said, ended, strict=True))

    def _padded(self, rows: Sequence[int]) -> tuple[Any, Any, Any]:
        """Token ids and positions [rows, width] behind the shared prefix, and the mask [rows, slots] of the whole text."""
        import torch

        rests = [list(self.prompts[i][self.shared :]) for i in rows]
        width = max(len(rest) for rest in rests)
        ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=self.model.device)
        mask = torch.ones(len(rows), self.shared + width + self.limit, dtype=torch.long, device=ids.device)
        for row, rest in enumerate(rests):
            mask[row, self.shared : self.shared + width - len(rest)] = 0
        positions = (mask[:, : self.shared + width].cumsum(-1) - 1).clamp(min=0)
        return ids, mask, positions[:, self.shared :]

    def _tokens(self, logits: Any, texts: Sequence[tuple[int, list[int]]]) -> Any:
        """The next tokens [rows, 1]; `texts` holds each row's prompt and what was said so far."""
        values, best = logits.max(-1, keepdim=True)  # CPU kernels of argmax are several times slower in bf16
        for (prompt, said), value in zip(texts, values[:, 0].tolist(), strict=True):
            if not math.isfinite(value):
                raise InputError(
                    self.names[prompt],
                    expected="finite logits",
                    found=f"{value} at token {len(said) + 1} of the answer",
                    fix="the weights may hold NaN, or overflow in float16: try float32",
                )
        if self.sampler is not None:
            return self.sampler.tokens(logits, [self.first + prompt for prompt, _ in texts])
        if self.exact:
            margins = MARGIN * logits.abs().amax(-1)
            first, second = logits.topk(2).values.unbind(-1)
            for row in (first - second <= margins).nonzero()[:, 0].tolist():
                prompt, said = texts[row]
                best[row] = self._alone([*self.prompts[prompt], *said], logits[row], float(margins[row]), self.names[prompt])
        return best

    def _alone(self, text: list[int], logits: Any, margin: float, name: str) -> int:
        """The next token of a text on its own; `logits` [vocabulary] are those that it had in its batch."""
        alone = self.model(input_ids=logits.new_tensor([text]).long(), use_cache=False, logits_to_keep=1).logits[0, -1]
        moved = float((alone - logits).abs().max())
        if not moved <= margin / 2:
            raise InputError(
                name,
                expected=f"logits that batching moves by at most {margin / 2:.2g}, as exact needs",
                found=f"{moved:.2g}",
                fix="leave out exact; this model amplifies rounding",
            )
        return int(alone.argmax())


def check_lengths(lengths: Sequence[int], limit: int, context: int | None, names: Sequence[str]) -> None:
    """Every prompt has a token and fits, with `limit` tokens of its answer, into a context of `context` tokens (None: any).

    Raises:
        InputError: naming the first prompt that does not.
    """
    for name, length in zip(names, lengths, strict=True):
        if length == 0:
            raise InputError(name, expected="at least one token", found="an empty prompt")
        if context is not None and length + limit > context:
            raise InputError(
                name,
                expected=f"at most {context} tokens with the answer",
                found=f"{length + limit} ({length} of the prompt, {limit} of the answer)",
                fix="shorten it, or lower answer_tokens",
            )
