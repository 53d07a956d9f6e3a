"""One training step and the bytes kept for backward of every form, beside PEFT's of the same kind where PEFT has it.

Each form in a process of its own: its step and PEFT's run alternating over one batch (4 × 256 tokens, the last half of
each row labelled), on the 210 linear layers of a bf16 SmolLM2-135M, forward, backward and AdamW; the ratio is the
median of the rounds' ratios. Bytes are counted by saved-tensor hooks up to the last hidden state, with transformers'
own attention in both, over what the frozen base alone keeps. Ranks are 16 but where a form lives on another.

In pieces: ``--forms`` takes some, ``--what`` bytes or steps alone (bytes need no quiet machine), and ``--add`` keeps
what the last result holds besides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import (
    Figure,
    Report,
    alternate,
    figure,
    fresh,
    main,
    parser,
    ratios,
    refuse,
    repeats,
    say,
    seconds,
)
from bench.memory_kept import floor, kept
from bench.pieces import can_add, earlier
from bench.step import QUICK_SHAPE, RANK, RATE, SHAPE, base_model, batch
from veneer.errors import UserError

WARM_UP, SETTLE = 1, 1
SLOWER = 1.05  # of PEFT's step, at most
ON_INPUT = 1.30  # kept bytes over the frozen base's, at most, of forms that act on the layer's input alone

# form → recipe, PEFT's config class with its options (None: PEFT has no such form), whether it acts on x alone.
FORMS: dict[str, tuple[str, tuple[str, dict[str, Any]] | None, bool]] = {
    "lora": (f"lora(rank={RANK})", ("Lora", {"r": RANK, "lora_alpha": RANK}), True),
    "lora, dropout": (
        f"lora(rank={RANK}, dropout=0.05)",
        ("Lora", {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.05}),
        True,
    ),
    "dora": (f"dora(rank={RANK})", ("Lora", {"r": RANK, "lora_alpha": RANK, "use_dora": True}), False),
    "lora-bias": (f"lora-bias(rank={RANK})", ("Lora", {"r": RANK, "lora_alpha": RANK, "lora_bias": True}), True),
    "kasa": (f"kasa(rank={RANK})", ("Lora", {"r": RANK, "lora_alpha": RANK, "kasa_config": {}}), True),
    "vera": ("vera(rank=256)", ("Vera", {"r": 256}), True),
    "randlora": ("randlora(rank=32)", ("RandLora", {"r": 32}), True),
    "loha": (f"loha(rank={RANK})", ("LoHa", {"r": RANK, "alpha": RANK}), True),
    "lokr": (f"lokr(rank={RANK})", ("LoKr", {"r": RANK, "alpha": RANK}), True),
    "ia3": ("ia3", ("IA3", {"feedforward_modules": ["down_proj"]}), False),
    "oft": ("oft(block_size=32)", ("OFT", {"oft_block_size": 32}), False),
    "boft": ("boft(block_size=4)", ("BOFT", {"boft_block_size": 4}), False),
    "bone": ("bone(rank=64)", ("Miss", {"r": 64}), True),
    "miss-mini": ("miss-mini(rank=64, columns=16)", ("Miss", {"r": 64, "mini_r": 16, "init_weights": "mini"}), True),
    "bat": ("bat(rank=64)", ("Miss", {"r": 64, "init_weights": "bat"}), True),
    "prompt": ("prompt(length=20)", ("PromptTuning", {"num_virtual_tokens": 20}), False),
    "prefix": ("prefix(length=20)", ("PrefixTuning", {"num_virtual_tokens": 20}), False),
    "lora-fa": (f"lora-fa(rank={RANK})", None, True),
    "rslora": (f"rslora(rank={RANK})", None, True),
}
PROMPTS = ("PromptTuning", "PrefixTuning")
# Forms without PEFT's that need more than the layer's input: its output, a whole module's, or W's own gradient.
MORE = ("adapter", "full", "hydra", "lofit", "mosa", "p-adapter")


def measure(options: argparse.Namespace) -> Report:
    """Seconds and bytes of each form, and their ratios."""
    shape = list(QUICK_SHAPE if options.quick else SHAPE)
    settings = {"dtype": "bfloat16", "rank": RANK, "shape": shape}
    every = {*FORMS, *others()}
    samples = {n: found for n, found in earlier("forms", settings).items() if n in every} if options.add else {}
    for name in options.forms or [*FORMS, *others()]:
        say(f"forms: {name}")
        quick = ["--quick"] if options.quick else []
        try:
            found = fresh(
                "bench.forms", "--side", name, "--what", options.what, "--repeats", str(repeats(options)), *quick
            )
        except UserError as refusal:
            say(f"  left out: {refusal}")
            continue
        samples[name] = samples.get(name, {}) | found
    return Report([line for name, found in samples.items() for line in figures(name, found)], samples, settings)


def figures(name: str, found: dict[str, Any]) -> list[Figure]:
    """The lines of one form."""
    lines, on_input = [], known(name)[2]
    if "peft" in found:
        lines.append(figure(f"{name}: step over PEFT's", ratios(found["ours"], found["peft"]), at_most=SLOWER))
    if "ours" in found:
        lines.append(figure(f"{name}: step", found["ours"], "s"))
    if "kept" in found:
        most = ON_INPUT if on_input else None
        lines.append(figure(f"{name}: kept over the base's", found["kept"] / found["base"], at_most=most))
    if "peft kept" in found:
        lines.append(figure(f"{name}: PEFT's kept over the base's", found["peft kept"] / found["base"]))
    return lines


def known(name: str) -> tuple[str, tuple[str, dict[str, Any]] | None, bool]:
    """The entry of `FORMS`, or that of another form of the registry."""
    return FORMS[name] if name in FORMS else (others()[name], None, name not in MORE)


def others() -> dict[str, str]:
    """The forms of the registry that are not in `FORMS`, by name: their recipes."""
    from veneer.core import registry
    from veneer.fields import fields_of

    found = {}
    for m in registry.methods("delta"):
        if m.name not in FORMS and {"linear", "module"} & set(m.cls.layers):
            rank = fields_of(m.cls).get("rank")
            found[m.name] = f"{m.name}(rank={RANK})" if rank is not None and rank.default != RANK else m.name
    return found


def both(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes kept and seconds of a form, of PEFT's, and bytes kept of the frozen base."""
    recipe, config, _ = known(name)
    rows = batch(*(QUICK_SHAPE if options.quick else SHAPE))
    ids = rows["input_ids"]
    found: dict[str, Any] = {}
    if options.what != "steps":
        found |= {"kept": ours_kept(ids, recipe), "base": floor(ids)}
        found |= {} if config is None else {"peft kept": theirs_kept(ids, config)}
    if options.what != "bytes":
        cases = {"ours": ours(rows, recipe)} | ({} if config is None else {"peft": theirs(rows, config)})
        timed = {label: lambda step=step: seconds(step) for label, step in cases.items()}
        quick = options.quick
        found |= alternate(timed, repeats(options), warm_up=1 if quick else WARM_UP, settle=0 if quick else SETTLE)
    return found


def attached(recipe: str) -> tuple[Any, Any]:
    """The base with a recipe on it, and its adapter."""
    import veneer
    from veneer.core.hook import Schedule

    model = base_model()
    return model, veneer.attach(model, recipe, schedule=Schedule(steps=100, lr=RATE))


def ours(rows: dict[str, Any], recipe: str) -> Callable[[], None]:
    """A step by ``veneer.causal_loss`` and the loop's optimiser."""
    import veneer
    from veneer.train import optimizer

    model, adapter = attached(recipe)
    update = optimizer.build(adapter, RATE, 0.0)

    def step() -> None:
        veneer.causal_loss(model, rows).backward()
        update.step()
        update.zero_grad(set_to_none=True)

    return step


def ours_kept(ids: Any, recipe: str) -> int:
    """Bytes that the form keeps, in the fast forms that ``causal_loss`` runs."""
    from veneer.models.fast import fast_forms
    from veneer.parts.plain import plain

    model, _ = attached(recipe)
    with fast_forms(model, plain, ("attention",)):
        return kept(model, lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state)


def wrapped(config: tuple[str, dict[str, Any]]) -> Any:
    """PEFT's model over the bf16 base, on all linear layers."""
    import warnings

    import peft

    form, fields = config
    if form not in PROMPTS:
        fields = {"target_modules": "all-linear"} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(peft, f"{form}Config")(task_type="CAUSAL_LM", **fields)
        return peft.get_peft_model(base_model(), made)


def theirs(rows: dict[str, Any], config: tuple[str, dict[str, Any]]) -> Callable[[], None]:
    """A step by PEFT, with torch's fused AdamW."""
    import torch

    model = wrapped(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def step() -> None:
        model(**rows).loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)

    return step


def theirs_kept(ids: Any, config: tuple[str, dict[str, Any]]) -> int:
    """Bytes that PEFT's form keeps."""
    model = wrapped(config)
    head = model.base_model.lm_head if config[0] in PROMPTS else model.base_model.model.lm_head
    found: list[Any] = []
    hook = head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    total = kept(
        model, lambda: (model(input_ids=ids, use_cache=config[0] == "PrefixTuning", logits_to_keep=1), found)[1]
    )
    hook.remove()
    return total


def arguments() -> argparse.Namespace:
    """The options, with the forms to try; ``--side`` and ``--out`` are for the process of one form."""
    made = parser(__doc__)
    made.add_argument("--forms", nargs="*", metavar="FORM", help="only these; all of the registry when none is given")
    made.add_argument("--what", choices=("bytes", "steps", "both"), default="both", help="what to measure")
    can_add(made)
    made.add_argument("--side", help=argparse.SUPPRESS)
    made.add_argument("--out", help=argparse.SUPPRESS)
    options = made.parse_args()
    every = [*FORMS, *others()]
    for name in options.forms or ():
        if name not in every:
            made.error(f"there is no form {name!r}; there are {', '.join(every)}")
    return options


if __name__ == "__main__":
    given = arguments()
    if given.side is None:
        main("forms", measure, given)
    else:
        try:
            Path(given.out).write_text(json.dumps(both(given.side, given)), encoding="utf-8")
        except UserError as error:
            refuse(str(error))
