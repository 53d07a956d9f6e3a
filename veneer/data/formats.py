"""The kinds of rows that a language model is trained on, each turned into pieces of text that train or do not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from veneer.data.chat import ChatTemplate
from veneer.data.columns import text_of, value_of
from veneer.data.encode import Draft
from veneer.data.read import Rows, kind_of, some
from veneer.errors import UserError, nearest

KINDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
# The two prompts of Stanford Alpaca (Taori et al. 2023), on which rows of this kind are trained elsewhere too.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PLACE = re.compile(r"\{(\w+)\}")


def kind_of_rows(names: Iterable[str], mapped: Iterable[str] = ()) -> str | None:
    """The first kind whose columns are all among ``names``; kinds that use a ``mapped`` column come before others."""
    names, mapped = set(names), set(mapped)
    found = [kind for kind, needs in KINDS.items() if names.issuperset(needs)]
    return min(found, key=lambda kind: mapped.isdisjoint(KINDS[kind]), default=None)


def is_jinja(template: str | None) -> bool:
    """Whether a template is a program that writes conversations."""
    return template is not None and ("{%" in template or "{{" in template)


def drafts(rows: Rows, kind: str, tokenizer: Any, template: str | None = None) -> list[Draft | str]:
    """Each row as a draft, or as the reason why it would train nothing.

    Args:
        rows: all of one ``kind`` (a key of ``KINDS``).
        template: None joins prompt and completion as they stand and puts instructions into Alpaca's prompt; ``"chat"``
            makes both a conversation of two turns in the tokenizer's chat template; a text with ``{prompt}``, or with
            any column's name in braces, is the prompt; a Jinja text is a chat template to use instead of the
            tokenizer's. Chat rows always use a chat template.
    """
    jinja = template if is_jinja(template) else None
    talks = kind in ("chat", "sharegpt")
    if kind == "text":
        if template is not None:
            raise UserError("a template was given and the rows are plain text, which has no prompt; leave it out")
        return [_whole(text_of(rows, index, "text")) for index in range(len(rows))]
    if talks and template not in (None, "chat") and jinja is None:
        raise UserError("chat rows are written by a chat template; expected a Jinja text or no template")
    if talks or template == "chat" or jinja:
        chat = ChatTemplate(tokenizer, jinja)
        turns = {"chat": _messages, "sharegpt": _sharegpt}.get(kind) or partial(_two_turns, kind=kind)
        return [_conversation(rows, index, turns(rows, index), chat) for index in range(len(rows))]
    if template is not None and not PLACE.search(template):
        raise UserError(
            f'the template "{template}" has no place for the prompt; expected a text with {{prompt}}, "chat", or Jinja'
        )
    answer = KINDS[kind][1]
    return [
        _answered(_prompt(rows, index, kind, template), text_of(rows, index, answer), answer)
        for index in range(len(rows))
    ]


def _whole(text: str) -> Draft | str:
    return Draft([(text, True)]) if text.strip() else "the text is empty"


def _answered(prompt: str, answer: str, column: str) -> Draft | str:
    return Draft([(prompt, False), (answer, True)]) if answer else f"the {column} is empty"


def _prompt(rows: Rows, index: int, kind: str, template: str | None) -> str:
    fields = _fields(rows, index, kind)
    if template is None:
        template = {"completion": "{prompt}"}.get(kind) or (ALPACA_WITH_INPUT if fields["input"] else ALPACA)

    def fill(place: re.Match[str]) -> str:
        name = place[1]
        if name not in fields:
            raise UserError(
                f"the template asks for {{{name}}}, which {rows.where(index)} does not have; "
                f"found: {some(fields)}{nearest(name, fields)}"
            )
        return str(fields[name])

    return PLACE.sub(fill, template)


def _fields(rows: Rows, index: int, kind: str) -> dict[str, Any]:
    """What a template can name: the row's columns, and the prompt of an instruction row."""
    if kind == "completion":
        prompt = value_of(rows, index, "prompt")
        if isinstance(prompt, list):
            raise UserError(
                f"{rows.where(index)}: the prompt is a list; expected a text, or prompt and completion as one list "
                "of turns in the column messages"
            )
        return {**rows[index], "prompt": text_of(rows, index, "prompt")}
    instruction, extra = text_of(rows, index, "instruction"), rows[index].get("input") or ""
    if not isinstance(extra, str):
        raise UserError(f'{rows.where(index)}: column "input" holds {kind_of(extra)}; expected a text')
    return {**rows[index], "input": extra, "prompt": f"{instruction}\n\n{extra}" if extra else instruction}


def _two_turns(rows: Rows, index: int, kind: str) -> list[dict[str, Any]]:
    prompt, answer = _fields(rows, index, kind)["prompt"], text_of(rows, index, KINDS[kind][1])
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _conversation(rows: Rows, index: int, messages: list[dict[str, Any]], chat: ChatTemplate) -> Draft | str:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        return "there is no assistant turn"
    if not any(message.get("content") or message.get("tool_calls") for message in answers):
        return "every assistant turn is empty"
    tools = rows[index].get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f'{rows.where(index)}: column "tools" is broken JSON ({error.msg})') from error
    return chat.draft(messages, tools, rows.where(index))


def _messages(rows: Rows, index: int, column: str = "messages") -> list[dict[str, Any]]:
    turns = value_of(rows, index, column)
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of(turns)
        raise UserError(f'{rows.where(index)}: column "{column}" holds {found}; expected a list of turns')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            found = f"has {some(turn)}" if isinstance(turn, Mapping) else f"is {kind_of(turn)}"
            raise UserError(f"{rows.where(index)}: turn {number} {found}; expected an object with role and content")
        if not isinstance(turn.get("content"), str | list | None):
            found = kind_of(turn["content"])
            raise UserError(f"{rows.where(index)}: the content of turn {number} is {found}; expected a text")
    return [dict(turn) for turn in turns]


def _sharegpt(rows: Rows, index: int) -> list[dict[str, Any]]:
    turns = value_of(rows, index, "conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        return _messages(rows, index, "conversations")
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of(turns)
        raise UserError(f'{rows.where(index)}: column "conversations" holds {found}; expected a list of turns')
    system = rows[index].get("system")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str) or "from" not in turn:
            found = f"has {some(turn)}" if isinstance(turn, Mapping) else f"is {kind_of(turn)}"
            raise UserError(f"{rows.where(index)}: turn {number} {found}; expected an object with from and value")
        speaker = turn["from"]
        if speaker not in SPEAKERS:
            raise UserError(
                f'{rows.where(index)}: turn {number} is from "{speaker}"; expected one of {", ".join(SPEAKERS)}'
            )
        messages.append({"role": SPEAKERS[speaker], "content": turn["value"]})
    return messages
