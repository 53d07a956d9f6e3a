"""N2N: a recurrent policy learns from short trials which layers keep an adapter, and of which rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.hook import Plan, Ranks
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import derived_seed, generator
from veneer.parts.attach import attach
from veneer.parts.attribution import loss_at, own_loss
from veneer.parts.modes import in_mode

Config = tuple[int, ...]  # a rank for every site, 0 for none
FADING = 15  # epochs over which the reward of a trial that breaks a constraint fades out


def reward(accuracy: float, whole: float, compression: float) -> float:
    """R = (a/a₀)·C(2 − C), with C the share of the parameters that were saved."""
    return accuracy / whole * compression * (2 - compression)


def constrained(value: float, epoch: int) -> float:
    """What a trial that breaks a constraint gets in place of R: (ε − 1) + ε·R, ε = (1 − e/15)⁴ within [0, 1]."""
    fade = max(0.0, 1 - epoch / FADING) ** 4
    return fade - 1 + fade * value


class Policy(nn.Module):
    """A two-layer LSTM over the layers of the model, with logits of an action at each.

    ``both`` reads the layers in both directions and decides all at once; else each decision is fed to the next step.
    features: (M, 5).
    """

    def __init__(self, actions: int, both: bool, features: int = 5, hidden: int = 30) -> None:
        super().__init__()
        self.both = both
        self.cells = nn.LSTM(features + (not both), hidden, num_layers=2, bidirectional=both)
        self.out = nn.Linear(hidden * (2 if both else 1), actions)

    def forward(self, features: Tensor, actions: Tensor | None = None, draw: torch.Generator | None = None):
        """(actions, log-probability of each, entropy of each), all (M,): of given actions, or of drawn ones."""
        if self.both:
            logits = self.out(self.cells(features)[0]).log_softmax(1)
            taken = torch.multinomial(logits.exp(), 1, generator=draw)[:, 0] if actions is None else actions
        else:
            steps, chosen, state = [], [], None
            last = features.new_ones(1)
            for m, x in enumerate(features):
                h, state = self.cells(torch.cat([x, last])[None], state)
                steps.append(self.out(h[0]).log_softmax(0))
                a = torch.multinomial(steps[-1].exp(), 1, generator=draw)[0] if actions is None else actions[m]
                chosen.append(a)
                last = (a / max(1, len(steps[-1]) - 1)).view(1)
            logits, taken = torch.stack(steps), torch.stack(chosen)
        return taken, logits.gather(1, taken[:, None])[:, 0], -(logits.exp() * logits).sum(1)


def policy(actions: int, both: bool, seed: int) -> Policy:
    """A policy whose start is a function of the seed; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "n2n policy", actions, both))
        return Policy(actions, both)


def reinforce(
    agent: Policy,
    features: Tensor,
    score: Callable[[Config, int], float],
    *,
    epochs: int,
    rollouts: int,
    lr: float,
    entropy: float = 0.0,
    advantage: str = "own",
    seed: int = 0,
) -> list[list[tuple[Config, float]]]:
    """Draw actions, score them, and follow −(R − b)·Σ log π; gives (actions, reward) of every rollout by epoch.

    ``score(actions, epoch)``; b is a moving average of the mean rewards (decay 0.9) that starts with the first of them.
    """
    optimizer = torch.optim.Adam(agent.parameters(), lr)
    history: list[list[tuple[Config, float]]] = []
    baseline: float | None = None
    for epoch in range(epochs):
        with torch.no_grad():
            drawn = [agent(features, draw=generator(seed, "n2n", epoch, k))[0] for k in range(rollouts)]
        found = [(tuple(a.tolist()), score(tuple(a.tolist()), epoch)) for a in drawn]
        mean = sum(r for _, r in found) / rollouts
        baseline = mean if baseline is None else baseline
        losses = []
        for actions, (_, r) in zip(drawn, found):
            _, logp, spread = agent(features, actions)
            losses.append(-((mean if advantage == "mean" else r) - baseline) * logp.sum() - entropy * spread.sum())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        baseline = 0.9 * baseline + 0.1 * mean
        history.append(found)
    return history


class Trials:
    """Short trainings of LoRA with given ranks at the sites, each configuration once.

    One adapter of the largest rank serves all of them: a trial of rank ρ trains the first ρ components from the same
    start, which is what an adapter of that rank would do.
    """

    def __init__(self, adapter: Any, train: list[Any], held: list[Any], steps: int, lr: float) -> None:
        self.adapter, self.train, self.held, self.steps, self.lr = adapter, train, held, steps, lr
        self.start = [p.detach().clone() for p in adapter.parameters()]
        self.known: dict[Config, float] = {}

    def __call__(self, config: Config) -> float:
        """The score on the held-out batches after the training."""
        if config not in self.known:
            self.known[config] = self._trained(config)
        return self.known[config]

    def size(self, config: Config) -> int:
        """Σ ρ·(in + out)."""
        return sum(r * (d.site.in_features + d.site.out_features) for r, d in zip(config, self.adapter.deltas.values()))

    def _trained(self, config: Config) -> float:
        params, model = self.adapter.parameters(), self.adapter.model
        with torch.no_grad():
            for p, p0 in zip(params, self.start):
                p.copy_(p0)
        for r, d in zip(config, self.adapter.deltas.values()):
            d.gate = (torch.arange(d.rank, device=d.A.device) < r).float()
        try:
            optimizer = torch.optim.AdamW(params, self.lr, weight_decay=0.0)
            for step in range(self.steps if any(config) else 0):
                loss = loss_at(model, {}, self.train[step % len(self.train)])
                for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True)):
                    p.grad = g
                optimizer.step()
            with torch.no_grad():
                return sum(loss_at(model, {}, b, _score).item() for b in self.held) / len(self.held)
        finally:
            for d in self.adapter.deltas.values():
                d.gate = None
            for p in params:
                p.grad = None


def _score(outputs: Any, batch: Any) -> Tensor:
    """A classifier's share of rows right; elsewhere exp(−loss), the likelihood of a label in the geometric mean."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    logits = getattr(outputs, "logits", None)
    rows = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    if rows and logits is not None and logits.ndim == 2:
        return (logits.argmax(1) == labels).float().mean()
    return (-own_loss(outputs, batch).float()).exp()


@method("n2n", axis="ranks", paper="arXiv:1709.06030", system=148)
class N2N(Ranks):
    """Learn by trial which sites get an adapter and of which rank, before training (Ashok et al. 2018, on adapters).

    A trial trains LoRA of some ranks for a few steps on the calibration batches but the last ones, and scores it on
    those: a, accuracy of a classifier, else exp(−loss). Its reward is R = (a/a₀)·C(2 − C), C being the share of
    parameters saved against the largest rank everywhere, whose score is a₀. Two policies learn by REINFORCE from the
    list of layers (role, in, out, rank, place): first which layers stay, a bidirectional LSTM; then, from the best of
    that, which rank each has, an LSTM that hears its last decision. The best trial of all is what is built.

    A trial that breaks ``most`` parameters or a share ``least`` of a₀ gets (ε − 1) + ε·R, ε fading over 15 epochs.

    Defaults: 5 trials an epoch, two layers of 30, Adam at 3e-3 as officially (there 0.1 in the second stage, which
    collapses); ranks 0, 1, 2, 4, 8, trials of 60 steps and 15 epochs a stage are ours. The official code gives all
    rollouts of an epoch their mean reward (``advantage="mean"``), starts its baseline at 0, keeps cells of the second
    policy unregistered so that they never learn, reads but never fills its cache, and takes rewards on test data; here
    each rollout has its own, the baseline is a moving average, and scores are kept, as rewards change with ε. Trials
    share one seed; a/a₀ is taken as at most 1 unless ``clip=False``, as short trials of many ranks come out low. What
    makes small adapters pay is C(2 − C): near 1 it is flat, so give ``least`` where an empty one must not win.
    """

    ranks: Annotated[tuple[int, ...], At(doc="what a site may have, 0 for nothing")] = (0, 1, 2, 4, 8)
    epochs: Annotated[int, At(ge=1, doc="epochs of each policy")] = 15
    rollouts: Annotated[int, At(ge=1, doc="trials an epoch")] = 5
    steps: Annotated[int, At(ge=1, doc="of a trial", unit="steps")] = 60
    lr: Annotated[float, At(gt=0, doc="learning rate of a trial")] = 1e-2
    policy_lr: Annotated[float, At(gt=0, doc="learning rate of the policies")] = 3e-3
    entropy: Annotated[float, At(ge=0, doc="weight of the policies' entropy")] = 0.01
    advantage: Annotated[Literal["own", "mean"], At(doc="a rollout's own reward, or the epoch's mean")] = "own"
    clip: Annotated[bool, At(doc="count a/a₀ as at most 1")] = True
    most: Annotated[int | None, At(ge=1, doc="parameters, at most")] = None
    least: Annotated[float | None, At(gt=0, doc="share of a₀, at least")] = None

    best: Config
    history: list[list[tuple[Config, float]]]

    def survey(self, model: nn.Module, sites: list[Site], batches: list[Any]) -> None:
        """Try, learn, try again; the model is left as it was."""
        if len(batches) < 2:
            raise UserError("n2n trains on some calibration batches and scores on others: give at least two")
        if len(set(self.ranks)) < 2 or min(self.ranks) < 0:
            raise UserError(f"n2n: ranks={self.ranks} must hold two different ones, none below 0")
        held = max(1, len(batches) // 4)
        self.sites = [s.path for s in sites if s.kind != "module"]
        with in_mode(model):
            adapter = attach(model, "lora", rank=max(self.ranks), sites=self.sites, name="n2n-trial", seed=self.seed)
            try:
                self.trials = Trials(adapter, batches[:-held], batches[-held:], self.steps, self.lr)
                self._search([d.site for d in adapter.deltas.values()])
            finally:
                adapter.remove()
                del self.trials

    def _search(self, sites: list[Site]) -> None:
        most, choices = max(self.ranks), sorted(self.ranks)
        whole = (most,) * len(sites)
        self.first, self.total = max(self.trials(whole), 1e-12), self.trials.size(whole)
        found = {whole: self.value(whole)}
        settings = {"epochs": self.epochs, "rollouts": self.rollouts, "lr": self.policy_lr, "entropy": self.entropy}
        settings |= {"advantage": self.advantage, "seed": self.seed}

        def scored(config: Config, epoch: int) -> float:
            found[config] = self.value(config)
            return self.value(config, epoch)

        removal = policy(2, True, self.seed)
        self.history = reinforce(
            removal, features(sites, whole, most), lambda a, e: scored(tuple(most * k for k in a), e), **settings
        )
        kept = self._best(found)
        shrink = policy(len(choices), False, self.seed)
        self.history += reinforce(
            shrink,
            features(sites, kept, most),
            lambda a, e: scored(tuple(choices[k] if r else 0 for k, r in zip(a, kept)), e),
            **settings,
        )
        self.best = self._best(found)

    def value(self, config: Config, epoch: int = FADING) -> float:
        """The reward of a configuration at an epoch; by default as if no constraint were forgiven."""
        a, size = self.trials(config), self.trials.size(config)
        if size > self.total:
            return -1.0
        found = reward(min(a, self.first) if self.clip else a, self.first, 1 - size / self.total)
        broken = (self.most is not None and size > self.most) or (
            self.least is not None and a < self.least * self.first
        )
        return constrained(found, epoch) if broken else found

    def _best(self, found: dict[Config, float]) -> Config:
        """The best that leaves something to train."""
        return max((c for c in found if any(c)), key=found.get)

    def plan(self, sites: list[Site], evidence: Any, form: dict[str, Any]) -> Plan:
        """The rank of every site, None where there is none."""
        if not isinstance(form.get("rank"), int):
            raise UserError("n2n gives ranks, and the form of this recipe has no field 'rank'; take lora or dora")
        plan: Plan = {}
        for path, rank in zip(self.sites, self.best):
            plan[path] = {"rank": rank} if rank else None
            if rank and form.get("alpha") is not None:
                plan[path]["alpha"] = form["alpha"] * rank / form["rank"]
        return plan


def features(sites: list[Site], ranks: Config, most: int) -> Tensor:
    """What a policy reads of each site, (M, 5) within [0, 1]: role, in, out, rank, place."""
    roles = sorted({s.role for s in sites})
    largest = max(max(s.in_features, s.out_features) for s in sites)
    rows = [
        [roles.index(s.role) / len(roles), s.in_features / largest, s.out_features / largest, r / most, m / len(sites)]
        for m, (s, r) in enumerate(zip(sites, ranks))
    ]
    return torch.tensor(rows)
