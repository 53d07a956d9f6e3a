"""Rank methods, optimisers and objectives as runs try them: what happens now and then happens in eight steps."""

import torch
from small_runs import llama

STEPS = 8
SUMS = [
    "adalora(rank=2, wait=1, settle=3)",
    "lora+sora(penalty=0.1)",
    "dylora",
    "dynamic-rank",
    "triadaptlora",
    "increlora+increlora-ranks(rank=2, block=1, top=7, wait=0, interval=2)",
    "flexora(steps=1, batches=1)",
    "diffora",
    "pc-darts",
    "lora+elastic(ranks=(1.0, 0.5), whole=0.5)",
    "colora(points=2, steps=2)",
    "n2n(epochs=1, rollouts=2, steps=1, ranks=(0, 4))",
    "lora+lora-pro",
    "lora+lora-pro(mode='efficient')",
    "lora+allora",
    "lora+lora-plus",
    "lora+lr-batch(probe=3, depth=3)",
    "lora+lora-ggpo",
    "galore(rank=4, gap=3)",
    "galore(rank=4, gap=3, bits=8)",
    "fira(rank=4, gap=3)",
    "frugal(gap=3)",
    "full+lisa(blocks=1, period=2)",
    "full+owlore(blocks=1, period=2)+galore(rank=4, gap=3)",
    "lora+ba-lora",
    "lora+ba-lora(svd=0.0)",
    "lora+pego",
    "lora+eva+adalora+ba-lora",
    "dora+eva+lora-ggpo+pego(slices=2)",
    "lst(reduction=2)",
    "sherl",
    "lora+glad",
    "lora+glad(mode='align', every=2)",
    "gaussian-lora(noise='weight')+abmll(inner_steps=2)",  # noise on outputs asks which rows share a pass
    "lora+canonical",
    "lora+m-fac(window=3)",
    "lora+man(blocks=2)",
]


def attached(recipe, **model):
    """The recipe on a fresh model, rank 4 where it names none."""
    import veneer
    from veneer.core.recipe import parse
    from veneer.fields import fields_of

    ids = torch.arange(1, 41).view(2, 20)
    ranked = any("rank" in fields_of(p.method.cls) and "rank" not in p.fields for p in parse(recipe).parts)
    calibration = [{"input_ids": ids, "labels": ids}, {"input_ids": ids + 1, "labels": ids + 1}]
    adapter = veneer.attach(llama(**model), recipe, rank=4 if ranked else None, calibration=calibration, sites="linear")
    for hook in adapter.hooks:
        if hook.name == "canonical":  # these models have no tokenizer to read a background with
            hook.hold(calibration, calibration[:1])
    return adapter
