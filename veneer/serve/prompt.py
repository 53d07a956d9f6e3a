"""Conversations as tokens, by the model's own chat template where it has one."""

from __future__ import annotations

from typing import Any

from veneer.errors import UserError


def prompt_of(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation, ready for the answer.

    A model without a template gets ``Role: text`` paragraphs. Raises UserError when the template refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template raises what it likes
            said = " ".join(str(error).split())[:200]
            raise UserError(f"the model's chat template refuses these messages: {said}") from None
        return list(found["input_ids"])
    lines = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return list(tokenizer("\n\n".join([*lines, "Assistant:"]))["input_ids"])


def stops_of(tokenizer: Any, model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        token = getattr(source, "eos_token_id", None)
        found.update(token if isinstance(token, list | tuple) else [] if token is None else [token])
    return frozenset(found)
