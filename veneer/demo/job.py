"""The demo from end to end: score, train, score again, and say where everything is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from veneer.demo.score import Score, score
from veneer.demo.words import Word, split
from veneer.errors import UserError
from veneer.report.screen import screen

MODEL, RECIPE = "smollm2-135m", "lora"
OUT, RECORD = "demo-run", "run.json"
EXAMPLES = 6
Answers = list[tuple[str, ...]]


class Size(NamedTuple):
    """How much of the task: words to score, bounds on words to train on, tokens of an answer, rank, batch, rate."""

    held_out: int
    fewest: int
    most: int
    longest: int
    rank: int
    batch_size: int
    lr: float


# An answer of 48 tokens is about three times the longest word's phonemes, where a word's edits are capped.
FULL = Size(held_out=200, fewest=800, most=6000, longest=48, rank=16, batch_size=16, lr=2e-3)
QUICK = Size(held_out=40, fewest=240, most=240, longest=20, rank=16, batch_size=10, lr=3e-3)


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
    return _Demo(QUICK if quick else FULL, seed, minutes).run(out)


class _Demo:
    """One demo on its way."""

    def __init__(self, size: Size, seed: int, minutes: float) -> None:
        self.size, self.seed, self.minutes = size, seed, minutes
        self.began = time.monotonic()
        self.console = screen()

    def run(self, out: str | None) -> dict[str, Any]:
        import veneer
        from veneer.models.load import packaged_path

        packaged_path(MODEL)  # its absence is said before anything else
        folder = self._folder(out)
        train, self.held = split(self.size.held_out, self.seed)
        word = next(w for w in self.held if len(w.spelling) > 4)
        self._say(
            "SmolLM2-135M-Instruct learns to pronounce, from the CMU dictionary: "
            f"[bold]{word.prompt}[/bold] is to become [bold]{word.completion.strip()}[/bold]"
        )
        self.model, self.tokenizer = veneer.load_model(MODEL)
        before, took = self._answers("before training")
        self.adapter = veneer.attach(self.model, RECIPE, rank=self.size.rank, seed=self.seed)
        left = (
            60 * self.minutes - (time.monotonic() - self.began) - 1.5 * took - 10
        )  # the rest: scoring, saving, drawing
        words = self._words(train, left)
        self._train(train[:words], folder)
        after, _ = self._answers("after training")
        return self._report(folder, words, before, after)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _folder(self, out: str | None) -> Path:
        """The folder of the run; one that holds a run is refused when it was named, passed over when it was not."""
        folder = Path(out or OUT)
        if not (folder / RECORD).exists():
            return folder
        if out is not None:
            raise UserError(f"--out {out} holds a run already; give another folder")
        number = 2
        while (Path(f"{OUT}-{number}") / RECORD).exists():
            number += 1
        self._say(f"{OUT} holds an earlier run; this one goes to {OUT}-{number}")
        return Path(f"{OUT}-{number}")

    def _answers(self, when: str) -> tuple[Answers, float]:
        """The model's phonemes for each held-out word, and the seconds it took; prints the score."""
        from veneer.train.evaluate import generate

        started = time.monotonic()
        with self.console.status(f"scoring {len(self.held)} held-out words {when}"):
            texts = generate(self.model, self.tokenizer, [w.prompt for w in self.held], self.size.longest, 100)
        predicted = [tuple(text.strip().split("\n")[0].split()) for text in texts]
        result = self._score(predicted)
        self._say(
            f"{when}: phoneme error rate {result.error_rate:.2f}, {result.exact:.0%} of {len(self.held)} held-out "
            "words exactly right"
        )
        return predicted, time.monotonic() - started

    def _score(self, predicted: Answers) -> Score:
        return score((p, w.phonemes) for p, w in zip(predicted, self.held, strict=True))

    def _words(self, train: Sequence[Word], seconds: float) -> int:
        """How many words can be trained on in ``seconds``: the work of a few steps is timed, nothing is learnt.

        A fifth of the time is kept back: other work on the machine may slow the run after it was timed.
        """
        import veneer
        from veneer.data import Batches, prepare

        size = self.size
        sample = prepare([w.row() for w in train[: 4 * size.batch_size]], self.tokenizer)
        tokens, took = 0, 0.0
        for number, rows in enumerate(Batches(sample.lengths, size.batch_size)):
            started = time.monotonic()
            veneer.causal_loss(self.model, sample.batch(rows)).backward()
            if number:  # the first one also allocates and chooses kernels
                took += time.monotonic() - started
                tokens += int(sample.lengths[rows].sum())
        for parameter in self.adapter.parameters():
            parameter.grad = None
        possible = int(0.8 * seconds * tokens / took * len(sample) / sample.tokens)
        words = min(max(possible, size.fewest), size.most)
        words -= words % size.batch_size
        self._say(f"{tokens / took:,.0f} tokens/s in the first steps: training on {words:,} words, each once")
        return words

    def _train(self, words: Sequence[Word], folder: Path) -> None:
        import veneer
        from veneer.report.progress import showing

        steps = len(words) // self.size.batch_size
        with showing() as display:
            veneer.fit(
                self.adapter,
                [w.row() for w in words],
                out=folder,
                eval_data=[w.row() for w in self.held],
                eval_every=max(-(-steps // 6), 30),
                save_every=steps,
                batch_size=self.size.batch_size,
                lr=self.size.lr,
                warmup=0.1,
                seed=self.seed,
                tokenizer=self.tokenizer,
                display=display,
            )

    def _report(self, folder: Path, words: int, before: Answers, after: Answers) -> dict[str, Any]:
        """Print the examples, what was trained and where things are; complete the record of the run."""
        from veneer.io.files import read_json, write_json, write_whole
        from veneer.report import plots, tables

        examples = [
            tables.Example(w.spelling, " ".join(w.phonemes), " ".join(b), " ".join(a))
            for w, b, a in list(zip(self.held, before, after, strict=True))[:EXAMPLES]
        ]
        self.console.print()
        self.console.print(tables.examples_table(examples, asked="held-out word"))
        self.console.print()
        self.console.print(tables.sites_table(self.adapter))
        self._say(f"trained: {tables.share_line(self.adapter)}")
        first, last = self._score(before), self._score(after)
        record = read_json(folder / RECORD)
        record |= {
            "title": f"{self.adapter.recipe} on SmolLM2-135M-Instruct: spelling to phonemes, {words:,} words",
            "seconds_training": record["seconds"],
            "seconds": None,
            "words": words,
            "held_out_words": len(self.held),
            "per_before": first.error_rate,
            "per_after": last.error_rate,
            "exact_before": first.exact,
            "exact_after": last.exact,
            "examples": [example._asdict() for example in examples],
        }
        picture = plots.curves(folder, title=record["title"])
        record["seconds"] = round(time.monotonic() - self.began, 1)
        write_whole(folder / RECORD, lambda scratch: write_json(scratch, record))
        for name, path in (("adapter", folder / "adapter"), ("curves", picture), ("record", folder / RECORD)):
            self._say(f"{name}: {path}")
        self._say(f'try it: echo "v e n e e r ->" | veneer chat --plain --model {MODEL} --adapter {folder}/adapter')
        self._say(
            f"phoneme error rate {first.error_rate:.2f} → [bold]{last.error_rate:.2f}[/bold], exactly right "
            f"{first.exact:.0%} → [bold]{last.exact:.0%}[/bold], in {record['seconds']:.0f} seconds"
        )
        return record
