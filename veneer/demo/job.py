"""The demo from end to end: score, train, score again, and say where everything is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from veneer.demo.score import Score, score
from veneer.demo.words import Word, split
from veneer.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

MODEL, RECIPE = "smollm2-135m", "lora"
RECORD = "run.json"
OUT = "demo-run"
EXAMPLES = 6
LONGEST_ANSWER = 48  # tokens: about three times the longest word's phonemes, where a word's edits are capped


class Size(NamedTuple):
    """How much of the task: words to score on, bounds on the words to train on, rank, batch size, peak rate."""

    held_out: int
    fewest: int
    most: int
    rank: int
    batch_size: int
    lr: float


FULL = Size(held_out=200, fewest=800, most=6000, rank=16, batch_size=16, lr=3e-3)
QUICK = Size(held_out=40, fewest=400, most=400, rank=16, batch_size=10, lr=3e-3)


def run(out: str | None = None, *, quick: bool = False, seed: int = 0, minutes: float = 4.0) -> dict[str, Any]:
    """Run the demo and give its record, which is also ``run.json`` in the run's folder.

    Args:
        out: folder of the run; by default ``demo-run``, or ``demo-run-2`` … when that is taken.
        quick: tens of steps and 40 words to score on.
        seed: of the split, the adapter's start and the order of the words.
        minutes: what the whole may take; the number of training words follows from the speed of the first steps.

    Raises:
        UserError: the model or data package is missing, or ``out`` holds a run.
    """
    from rich.console import Console

    began = time.monotonic()
    console, size = Console(highlight=False), QUICK if quick else FULL
    _require_model()
    folder = _folder(out, console)
    train, held = split(size.held_out, seed)

    import veneer
    from veneer.report.progress import display

    word = next(w for w in held if len(w.spelling) <= 8)
    console.print(
        f"SmolLM2-135M-Instruct learns English pronunciation from the CMU dictionary: "
        f"[bold]{word.prompt}[/bold] is to become [bold]{word.completion.strip()}[/bold]"
    )
    model, tokenizer = veneer.load_model(MODEL)
    before, seconds = _scored(model, tokenizer, held, console, "before training")

    adapter = veneer.attach(model, RECIPE, rank=size.rank, seed=seed)
    spent = time.monotonic() - began
    left = minutes * 60 - spent - 1.5 * seconds - 10  # the second evaluation, saving and drawing
    words, rate = _words(adapter, tokenizer, train, size, left)
    console.print(f"{rate:,.0f} tokens/s in the first steps: training on {words:,} words, each once")
    steps = -(-words // size.batch_size)
    started = time.monotonic()
    veneer.fit(
        adapter,
        [w.row() for w in train[:words]],
        out=str(folder),
        eval_data=[w.row() for w in held],
        eval_every=max(steps // 5, 1),
        save_every=steps,
        batch_size=size.batch_size,
        lr=size.lr,
        warmup=0.05,
        seed=seed,
        tokenizer=tokenizer,
        display=display(),
    )
    trained = time.monotonic() - started
    after, _ = _scored(model, tokenizer, held, console, "after training")
    return _report(folder, console, adapter, held, before, after, words, trained, began)


def _require_model() -> None:
    from veneer.models.load import packaged_path

    packaged_path(MODEL)


def _folder(out: str | None, console: Console) -> Path:
    """The folder of the run; one that holds a run is refused when it was named, and passed over when it was not."""
    folder = Path(out or OUT)
    if not (folder / RECORD).exists():
        return folder
    if out is not None:
        raise UserError(f"--out {out} holds a run already; give another folder")
    number = 2
    while (Path(f"{OUT}-{number}") / RECORD).exists():
        number += 1
    console.print(f"{OUT} holds an earlier run; this one goes to {OUT}-{number}")
    return Path(f"{OUT}-{number}")


def _scored(
    model: Any, tokenizer: Any, held: Sequence[Word], console: Console, when: str
) -> tuple[list[tuple[str, ...]], float]:
    """What the model answers for each held-out word, as phonemes, and the seconds it took; prints the score."""
    from veneer.train.evaluate import generate

    started = time.monotonic()
    with console.status(f"scoring {len(held)} held-out words {when}"):
        texts = generate(model, tokenizer, [w.prompt for w in held], LONGEST_ANSWER, batch_size=100)
    predicted = [_phonemes(text) for text in texts]
    console.print(f"{when}: {_words_of(_score(predicted, held))}, on {len(held)} held-out words")
    return predicted, time.monotonic() - started


def _phonemes(text: str) -> tuple[str, ...]:
    """The words of the answer's first line."""
    return tuple(text.strip().split("\n")[0].split())


def _score(predicted: Sequence[Sequence[str]], held: Sequence[Word]) -> Score:
    return score((p, w.phonemes) for p, w in zip(predicted, held, strict=True))


def _words_of(result: Score) -> str:
    return f"phoneme error rate {result.error_rate:.2f}, {100 * result.exact:.0f} % of words exactly right"


def _words(adapter: Any, tokenizer: Any, train: Sequence[Word], size: Size, seconds: float) -> tuple[int, float]:
    """(words that can be trained on in ``seconds``, tokens per second): three steps' work is timed, nothing is learnt.

    A fifth of the time is kept back: other work on the machine can slow the run after it was timed.
    """
    import veneer
    from veneer.data import Batches, prepare

    sample = prepare([w.row() for w in train[: 4 * size.batch_size]], tokenizer)
    tokens, took = 0, 0.0
    for number, rows in enumerate(Batches(sample.lengths, size.batch_size)):
        started = time.monotonic()
        veneer.causal_loss(adapter.model, sample.batch(rows)).backward()
        if number:  # the first one also allocates and chooses kernels
            took += time.monotonic() - started
            tokens += int(sample.lengths[rows].sum())
    for parameter in adapter.parameters():
        parameter.grad = None
    rate = tokens / took
    possible = int(0.8 * seconds * rate * len(sample) / sample.tokens)
    words = min(max(possible, size.fewest), size.most)
    return words - words % size.batch_size, rate


def _report(
    folder: Path,
    console: Console,
    adapter: Any,
    held: Sequence[Word],
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    words: int,
    trained: float,
    began: float,
) -> dict[str, Any]:
    """Print the examples, what was trained and where things are; complete the record of the run."""
    from veneer.io.files import read_json, write_json, write_whole
    from veneer.report import plots, tables

    examples = [
        tables.Example(w.spelling, " ".join(w.phonemes), " ".join(b), " ".join(a))
        for w, b, a in list(zip(held, before, after, strict=True))[:EXAMPLES]
    ]
    first, last = _score(before, held), _score(after, held)
    console.print()
    console.print(tables.examples_table(examples, asked="held-out word"))
    console.print()
    console.print(tables.sites_table(adapter))
    console.print(f"trained: {tables.share_line(adapter)}")
    picture = plots.curves(folder)
    record = read_json(folder / RECORD)
    seconds = time.monotonic() - began
    record |= {
        "demo": True,
        "seconds": round(seconds, 1),
        "seconds_training": round(trained, 1),
        "words": words,
        "held_out_words": len(held),
        "per_before": first.error_rate,
        "per_after": last.error_rate,
        "exact_before": first.exact,
        "exact_after": last.exact,
        "examples": [example._asdict() for example in examples],
    }
    write_whole(folder / RECORD, lambda scratch: write_json(scratch, record))
    for name, path in (("adapter", folder / "adapter"), ("curves", picture), ("record", folder / RECORD)):
        console.print(f"{name}: {path}", soft_wrap=True)
    console.print(
        f"phoneme error rate {first.error_rate:.2f} → [bold]{last.error_rate:.2f}[/bold], exactly right "
        f"{100 * first.exact:.0f} % → [bold]{100 * last.exact:.0f} %[/bold], in {seconds:.0f} seconds"
    )
    return record
