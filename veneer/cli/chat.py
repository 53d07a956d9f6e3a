"""``veneer chat``: talk to a model, with the adapter and without."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from veneer.cli.options import AdapterFolder, Model

HELP = "/base turns the adapter off and on, /reset forgets the conversation, /quit leaves"


def command(
    model: Model,
    adapter: AdapterFolder = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Send each line as it stands, without the chat template or earlier turns.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system message.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Sample among the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
) -> None:
    """Talk to a model, with an adapter or without.

    Answers stream. Lines may also come from a pipe. /base turns the adapter off and on, /reset forgets what was said.
    """
    import torch

    import veneer
    from veneer.report.screen import screen

    base, tokenizer = veneer.load_model(model)
    base.eval()
    loaded = veneer.load(base, adapter) if adapter else None
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    sampling["max_new_tokens"] = max_new_tokens
    talk = Talk(base, tokenizer, loaded, plain=plain, system=system, settings=sampling)
    console = screen()
    if sys.stdin.isatty():
        console.print(f"[dim]{HELP}[/dim]")
    for line in lines(talk, console):
        talk.turn(line, lambda piece: console.print(piece, end="", markup=False, soft_wrap=True))
        console.print()


def lines(talk: Talk, console: Any) -> Iterator[str]:
    """What the user says, commands taken out and obeyed; ends with the input."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = console.input(f"[bold cyan]{talk.speaker}>[/bold cyan] " if asks else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            console.print(f"[dim]{talk.obey(line)}[/dim]")
        elif line:
            yield line


@dataclass
class Talk:
    """One conversation with a model, whose adapter can be off."""

    model: Any
    tokenizer: Any
    adapter: Any = None
    plain: bool = False
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    off: bool = False

    def __post_init__(self) -> None:
        self.plain = self.plain or getattr(self.tokenizer, "chat_template", None) is None
        self.reset()

    @property
    def speaker(self) -> str:
        """Who answers: "base" or "adapter"."""
        return "base" if self.off or self.adapter is None else "adapter"

    def reset(self) -> None:
        """Forget what was said."""
        self.said: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []

    def obey(self, line: str) -> str:
        """Carry out ``/base``, ``/reset`` or ``/help`` and say what happened."""
        if line == "/base":
            if self.adapter is None:
                return "there is no adapter to turn off: veneer chat --adapter FOLDER"
            self.off = not self.off
            return f"the adapter is {'off: the base answers' if self.off else 'on'}"
        if line == "/reset":
            self.reset()
            return "the conversation is forgotten"
        return HELP if line == "/help" else f"there is no command {line}; {HELP}"

    def turn(self, line: str, show: Callable[[str], None]) -> str:
        """Answer ``line``, giving each piece of text to ``show`` as it comes, and return the whole answer."""
        self.said.append({"role": "user", "content": line})
        if self.plain:
            encoded = self.tokenizer(line, return_tensors="pt")
        else:
            encoded = self.tokenizer.apply_chat_template(
                self.said, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        answer = self._generate({k: encoded[k] for k in ("input_ids", "attention_mask")}, show)
        self.said.append({"role": "assistant", "content": answer})
        return answer

    def _generate(self, inputs: dict[str, Any], show: Callable[[str], None]) -> str:
        from contextlib import nullcontext

        import torch
        from transformers import TextStreamer

        pieces: list[str] = []

        class Stream(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                show(text)

        stream = Stream(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = {k: v.to(self.model.device) for k, v in inputs.items()}
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        with torch.inference_mode(), self.adapter.disabled() if self.off else nullcontext():
            self.model.generate(**inputs, streamer=stream, pad_token_id=pad, **self.settings)
        return "".join(pieces)
