"""Where the answers stand in a conversation that a chat template has written out.

A template is a program, so nothing is assumed about it. If it marks answers itself ({% generation %}) the marks are
taken. Otherwise an answer is what the template writes after the conversation so far and the prompt for an answer, up
to the conversation with that answer; both must be beginnings of the whole text. Templates that rewrite earlier turns
(those that drop old thoughts) break the second half of this; there the answer's content is found by rendering once
more with a word in its place. Where neither is certain the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.data.encode import Draft
from veneer.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
STANDIN = "Qz7standin7Zq"  # survives trimming and stands in no template

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class ChatTemplate:
    """A tokenizer's chat template, or a Jinja text in its place.

    Attributes:
        closing: what ends an answer ("<|im_end|>"), found by rendering one: from its content through the first special
            token; empty where there is none. It trains with the answer; what the template writes after it does not.
        prompts: whether the template has a prompt for an answer ("<|im_start|>assistant").
    """

    def __init__(self, tokenizer: Any, jinja: str | None = None) -> None:
        self.tokenizer, self.jinja = tokenizer, jinja
        if jinja is None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "chat rows need a chat template and this tokenizer has none; take the tokenizer of a model tuned for "
                "chat, give a Jinja template, or write the rows as prompt and completion"
            )
        question = [{"role": "user", "content": "x"}]
        prompted, bare = self._attempt(question, None, True), self._attempt(question, None)
        self.prompts = prompted is not None and prompted != bare
        written = self._attempt([*question, {"role": "assistant", "content": STANDIN}], None) or ""
        self.closing = self._through_special(written.partition(STANDIN)[2])

    def draft(self, messages: Messages, tools: list | None, where: str) -> Draft:
        """The conversation as pieces, those of the assistant training, end tokens included."""
        if GENERATION.search(self.tokenizer.get_chat_template(self.jinja, tools)):
            text, spans = self._marked(messages, tools, where)
        else:
            text = self._render(messages, tools, where=where)
            answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [self._span(messages, tools, k, text, where) for k in answers]
        pieces, done = [], 0
        for start, end in spans:
            if start < done:
                raise UserError(f"{where}: {_unsure('the answers overlap')}")
            pieces += [(text[done:start], False), (text[start:end], True)]
            done = end
        return Draft([*pieces, (text[done:], False)], framed=False)

    def _marked(self, messages: Messages, tools: list | None, where: str) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(self.jinja, tools)
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            rendered: Any = render_jinja_template(
                [plain], tools=tools, chat_template=template, return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as error:
            raise UserError(f"{where}: the chat template refuses this row ({error})") from error
        (text,), (spans,) = rendered
        return text, [(start, self._closed(text, end)) for start, end in spans if start < end]

    def _span(self, messages: Messages, tools: list | None, k: int, text: str, where: str) -> Span:
        before = self._attempt(messages[:k], tools, prompt=True)
        after = text if k == len(messages) - 1 else self._attempt(messages[: k + 1], tools)
        start = len(before) if before and text.startswith(before) else None
        end = len(after) if after and text.startswith(after) else None
        if start is None or end is None or not self.prompts:
            content = self._content(messages, tools, k, text)
            if content is None:
                raise UserError(f"{where}: {_unsure(f'message {k + 1} reads differently alone and in the whole')}")
            # Without a prompt for answers the span begins with the turn's heading, unless there is only a space.
            if start is None or (not self.prompts and text[start : content[0]].strip()):
                start = content[0]
            if end is None:
                end = self._closed(text, content[1])
        closing = text.rfind(self.closing, start, end) if self.closing else -1
        return start, closing + len(self.closing) if closing >= 0 else end

    def _content(self, messages: Messages, tools: list | None, k: int, text: str) -> Span | None:
        """Where the content of message k stands in the whole text, if that is certain."""
        if not isinstance(messages[k].get("content"), str):
            return None
        other = self._attempt([*messages[:k], {**messages[k], "content": STANDIN}, *messages[k + 1 :]], tools)
        if other is None or other.count(STANDIN) != 1:
            return None
        head, tail = other.split(STANDIN)
        sure = text.startswith(head) and text.endswith(tail) and len(head) + len(tail) <= len(text)
        return (len(head), len(text) - len(tail)) if sure else None

    def _closed(self, text: str, end: int) -> int:
        """The end of an answer, moved behind its closing if that comes next."""
        at = text.find(self.closing, end)
        return at + len(self.closing) if at >= 0 and not text[end:at].strip() else end

    def _render(self, messages: Messages, tools: list | None, prompt: bool = False, where: str = "") -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.jinja, add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # whatever a template's own code raises
            raise UserError(f"{where}: the chat template refuses this row ({error})") from error

    def _attempt(self, messages: Messages, tools: list | None, prompt: bool = False) -> str | None:
        """A part of a conversation, or None where the template wants whole ones."""
        try:
            return self._render(messages, tools, prompt)
        except UserError:
            return None

    def _through_special(self, text: str) -> str:
        """A text through the first special token in it."""
        names = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        found = [(text.find(name), -len(name)) for name in names if name in text]
        return text[: min(found)[0] - min(found)[1]].strip() if found else ""


def _unsure(why: str) -> str:
    return (
        f"the chat template does not show for certain where the answers stand ({why}); give a template that marks them "
        "with {% generation %}, or write the rows as prompt and completion"
    )
