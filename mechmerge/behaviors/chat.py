"""From a prompt to the text that a model reads: the chat template is a stated setting, never a default of the moment."""

from __future__ import annotations

import hashlib
from typing import Any

from mechmerge.errors import InputError

DATE = "26 Jul 2024"
"""The date for templates that print one (the Llama 3 templates' own default): a text must not change overnight."""


def chat_template_of(tokenizer: Any, setting: str) -> str | None:
    """The chat template that a setting stands for.

    Args:
        tokenizer: a transformers tokenizer.
        setting: `model` (the tokenizer's own), `none` (prompts as they are), or a Jinja template.

    Returns:
        The Jinja template, or None for `none`.

    Raises:
        InputError: `model`, and the tokenizer has none.
    """
    if setting == "none":
        return None
    if setting != "model":
        return setting
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError(
            f"chat_template: model ({tokenizer.name_or_path})",
            expected="a tokenizer with a chat template",
            found="none",
            fix="use `chat_template: none`, or give a Jinja template there",
        )
    return str(template)


def template_digest(template: str | None) -> str:
    """sha256, in hex, of a template; `none` where there is none."""
    return "none" if template is None else hashlib.sha256(template.encode()).hexdigest()


def render(tokenizer: Any, prompt: str, template: str | None) -> str:
    """The prompt as one user turn followed by the template's opening of the answer (or as it is without a template).

    A rendered text already holds its special tokens: tokenize it with `add_special_tokens=False`, except for `none`.

    Raises:
        InputError: the template is not valid Jinja, or refuses a single user turn.
    """
    if template is None:
        return prompt
    from jinja2.exceptions import TemplateError

    turn = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, chat_template=template, date_string=DATE
        )
    except TemplateError as error:
        raise InputError("chat_template", expected="a Jinja template that takes one user turn", found=str(error)) from None
    return text
