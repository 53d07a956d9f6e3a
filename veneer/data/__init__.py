"""From rows to batches: reading, templates and masks, batching by length, and scoring.

Knows tokenizers and image processors, not models; every fault of the data is one sentence before long work starts.
Each file is one idea: `prepare` puts them together, `Batches` decides the order, `show` is for a person's eyes."""

from veneer.data.batching import Batches
from veneer.data.collate import IGNORED, Collator
from veneer.data.dataset import Dataset, prepare
from veneer.data.read import Rows, read_rows
from veneer.data.show import render_rows, summary

__all__ = ["IGNORED", "Batches", "Collator", "Dataset", "Rows", "prepare", "read_rows", "render_rows", "summary"]
