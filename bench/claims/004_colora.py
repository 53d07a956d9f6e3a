"""CoLoRA (arXiv:2408.01099): ranks by contribution, on a network pre-trained by random degradations in random order."""

from bench.claims.harness import Claim, Trial, With
from bench.claims.photographs import Restoring
from bench.claims.verdicts import above, at_least, every


def biases_ahead(trial: Trial) -> float:
    """The share of layers whose bias contributes more a number than their weight; 0 where nothing was attributed."""
    found = next((h.contributions for h in trial.adapter.hooks if hasattr(h, "contributions")), {})
    layers = [n.removesuffix(".bias") for n in found if n.endswith(".bias") and n.replace("bias", "weight") in found]
    return sum(found[f"{n}.bias"] > found[f"{n}.weight"] for n in layers) / max(1, len(layers))


CLAIM = Claim(
    number=4,
    name="colora",
    claim="Pre-training by random degradations helps on a new one, biases contribute more a number than weights do, "
    "and ranks by contribution end at a higher PSNR than one rank everywhere.",
    task=Restoring(),
    contestants={
        "colora": With(
            "lora+colora(error='squares', points=20, steps=60, lr=0.001)", rank=2, sites="conv", calibrate=True
        ),
        "lora": With("lora", rank=2, sites="conv", train=("*bias", "*norm*")),
        "full": With("full(norms=True)", sites="conv"),
        "scratch": With("full(norms=True)", sites="conv", task=Restoring(prod=False)),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    sweep_seeds=1,
    rule=every(above("full", "scratch"), at_least("colora", 0.5, on="biases ahead"), above("colora", "lora")),
    measures={"biases ahead": biases_ahead},
    note="Equal size in place of the paper's 7 % of the parameters, at which layers this narrow have no rank at all.",
)

if __name__ == "__main__":
    CLAIM.main()
