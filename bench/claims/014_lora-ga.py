"""LoRA-GA (arXiv:2407.05000): the first step of B·A goes where full fine-tuning would move W."""

import torch
from torch.nn.functional import cosine_similarity

from bench.claims.harness import Claim, Trial, With
from bench.claims.texts import Letters
from bench.claims.verdicts import above, below, every


@torch.enable_grad()
def alignment(trial: Trial) -> float:
    """Cosine between the first step of plain descent on A and B, as a change of W, and the step of descent on W."""
    trial.model = trial.task.model(trial.seed)
    adapter = trial.attach(trial.contestant.recipe)
    batch = trial.task.calibration(trial.seed)[0]
    pairs = list(adapter.pairs())
    weights = [site.module.weight for site, *_ in pairs]
    for W in weights:
        W.requires_grad_()
    trial.model(**batch).loss.backward()
    steps = [s * (B.grad @ A + B @ A.grad) for _, A, B, s in pairs]
    flat = [torch.cat([t.detach().flatten() for t in tensors]) for tensors in (steps, [W.grad for W in weights])]
    return float(cosine_similarity(*flat, dim=0))


CLAIM = Claim(
    number=14,
    name="lora-ga",
    claim="LoRA-GA's first step is nearer to full fine-tuning's than LoRA's, it converges faster and ends lower.",
    task=Letters(steps=100),
    contestants={"lora-ga": With("lora(rank=4)+lora-ga"), "lora": With("lora(rank=4)")},
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    measures={"alignment": alignment},
    rule=every(
        above("lora-ga", "lora", on="alignment"),
        below("lora-ga", "lora", on="train_loss"),
        below("lora-ga", "lora"),
    ),
)

if __name__ == "__main__":
    CLAIM.main()
