"""BA-LoRA: three terms on the logits against what a model inherits from its pre-training data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.core.hook import Objective, Run
from veneer.core.registry import method
from veneer.fields import At

POSITIONS = 256  # rows of the matrix whose singular values are taken, at most


def class_terms(Z: Tensor, P: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Consistency, diversity and concentration of class logits Z (n, C) against the base's P (n, C)."""
    consistency = (F.normalize(Z, dim=1) - F.normalize(P, dim=1)).square().mean()
    centred = Z - Z.mean(0)
    K = centred.T @ centred / max(1, len(Z) - 1)
    diversity = (K.square().sum() - K.diagonal().square().sum()) / Z.shape[1]
    return consistency, diversity, concentration(Z, k)


def token_terms(Z: Tensor, P: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for next-token logits: KL(p‖q) and the negative entropy of q, means over the n positions."""
    q, p = Z.log_softmax(1), P.log_softmax(1)
    consistency = (p.exp() * (p - q)).sum(1).mean()
    diversity = (q.exp() * q).sum(1).mean()
    return consistency, diversity, concentration(Z, k)


def concentration(Z: Tensor, k: int) -> Tensor:
    """−(Σ_{i≤k} σᵢ)/(Σᵢ σᵢ) of Z (n, C), by the smaller Gram matrix: eigenvalues have a stable gradient."""
    rows = Z[torch.linspace(0, len(Z) - 1, min(len(Z), POSITIONS), device=Z.device).long()]
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).flip(0)
    sigma = values.clamp_min(values[0].detach().clamp_min(1e-30) * 1e-12).sqrt()
    return -sigma[:k].sum() / (sigma.sum() + 1e-10)


@method("ba-lora", axis="objective", paper="arXiv:2408.04556", system=6, defaults="lora+pissa")
class BALoRA(Objective):
    """Stay near the base's output, keep outputs spread, concentrate the logit matrix (Chang et al. 2024).

    L = L_task + λ₁·L_con + λ₂·L_div + λ₃·L_svd on the logits Z (n, C) of the adapted model, with P those of the
    original one on the same inputs: for classes, see ``class_terms``; for next tokens, ``token_terms``. n counts the
    rows of a classifier and the labelled positions of a language model. The λ and k = 3 are the official script's.

    Differences from the official code, which does not run as published: the reference is the true base (its script
    took PiSSA's residual); padding and prompt positions are left out; the terms are means over positions, where its KL
    was divided by the batch rows alone (``reduction="batch"`` gives that); singular values are of the n × C matrix of
    at most 256 evenly spaced positions. Without a carrier in the recipe it is the paper's, LoRA from PiSSA. Costs one
    forward of the base a batch and nothing in the checkpoint. Batch statistics are each replica's own.
    """

    consistency: Annotated[float, At(ge=0, doc="λ₁")] = 1e-4
    diversity: Annotated[float, At(ge=0, doc="λ₂")] = 3e-4
    svd: Annotated[float, At(ge=0, doc="λ₃")] = 1e-4
    k: Annotated[int, At(ge=1, doc="singular values that count")] = 3
    reduction: Annotated[Literal["position", "batch"], At(doc="what the consistency is a mean over")] = "position"

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        weights = (self.consistency, self.diversity, self.svd)
        if not any(weights):
            return None
        with torch.no_grad():
            reference = run(batch, adapter="off").logits
        tokens = outputs.logits.ndim == 3
        keep = _scored(batch["labels"], outputs.logits) if tokens else slice(None)
        Z, P = outputs.logits[keep].float(), reference[keep].float()
        terms = list((token_terms if tokens else class_terms)(Z, P, self.k))
        if tokens and self.reduction == "batch":
            terms[0] = terms[0] * len(Z) / len(outputs.logits)
        return sum(w * t for w, t in zip(weights, terms) if w)


def _scored(labels: Tensor, logits: Tensor) -> Tensor:
    """Positions whose next token carries a label, (rows, tokens)."""
    scored = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    scored[:, :-1] = labels[:, 1:] != -100
    return scored
