"""PiSSA (arXiv:2404.02948): the principal part of W trains, in place of noise and zeros."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every

LORA = With("lora(rank=4)")

CLAIM = Claim(
    number=99,
    name="pissa",
    claim="At equal rank and steps PiSSA converges faster than LoRA and ends lower.",
    task=Letters(steps=100),
    contestants={"pissa": With("lora(rank=4)+pissa"), "lora": LORA},
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=every(below("pissa", "lora"), below("pissa", "lora", on="train_loss")),
    note="Each at the rate that suits it best; the sheet's own runs saw PiSSA ahead at LoRA's usual rate alone.",
)

if __name__ == "__main__":
    CLAIM.main()
