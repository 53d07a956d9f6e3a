"""A backend that only keeps time, traces to run on it, and the metrics of a run.

The costs are those of Llama-7B on an A10G, under which S-LoRA published what its policies do (sheet 143, oracle 12):
prefill 0.4 ms a token, a decode step 30 ms and 0.6 ms a request, loading an adapter 62.5 µs a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from veneer.serve.admission import Room
from veneer.serve.policies.policy import Policy


class Arrival(NamedTuple):
    """One request of a trace: when, for which adapter, prompt and output length."""

    time: float
    adapter: int
    inputs: int
    outputs: int


def gamma_power(
    adapters: int = 32,
    alpha: float = 0.3,
    rate: float = 2.0,
    cv: float = 1.0,
    duration: float = 300.0,
    lengths: tuple[int, int] = (8, 512),
    seed: int = 42,
) -> list[Arrival]:
    """S-LoRA's workload: adapters by a power law (``alpha`` = 1 is uniform), gaps Gamma of variation ``cv``."""
    draw = np.random.RandomState(seed)
    count = int(rate * duration)
    chosen = (draw.power(alpha, count) * adapters).astype(int)
    inputs, outputs = draw.randint(*lengths, count), draw.randint(*lengths, count)
    times = np.cumsum(draw.gamma(1 / cv**2, cv**2 / rate, count))
    return [Arrival(float(t), int(a), int(i), int(o)) for t, a, i, o in zip(times, chosen, inputs, outputs)]


class Simulated:
    """A request of a trace in the simulator; ``prompt`` has the length of one."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival, self.adapter, self.prompt, self.limit = (
            arrival.time,
            arrival.adapter,
            range(arrival.inputs),
            arrival.outputs,
        )
        self.count = 0
        self.first: float | None = None
        self.finished: float | None = None
        self.aborted = False

    @property
    def generated(self) -> range:
        """As many as there are tokens."""
        return range(self.count)

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.prompt) + self.count

    @property
    def left(self) -> int:
        """Tokens still to come."""
        return self.limit - self.count


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    prefill: float = 0.4e-3
    step: float = 30e-3
    request: float = 0.6e-3
    cell: float = 62.5e-6


@dataclass(frozen=True)
class Metrics:
    """Of one run; times in seconds. Aborted requests count 0 in attainment and satisfaction."""

    throughput: float
    latency: float
    first_token: float
    first_p50: float
    first_p90: float
    attainment: float
    satisfaction: float
    aborted: int
    hit_rate: float
    batch: float
    adapters: float


def satisfaction(first: float, deadline: float = 6.0) -> float:
    """1 − (t/τ)², and 0 from τ on."""
    return max(0.0, 1 - (first / deadline) ** 2)


def run(
    trace: Sequence[Arrival],
    policy: Policy,
    *,
    cells: int = 14_000,
    rank: Callable[[int], int] = lambda adapter: (64, 32, 16, 8)[adapter % 4],
    costs: Costs = Costs(),
    wait: int = 10,
    deadline: float = 6.0,
) -> Metrics:
    """Run a trace: an admission every ``wait`` decode steps, no prefetch, adapters resident while they are used."""
    room = Room(cells, lambda a: [(a, 4 * rank(a))], prompts=max(cells // 6, 3072))
    requests = [Simulated(a) for a in trace]
    queue: list[Simulated] = []
    running: list[Simulated] = []
    clock, nth, steps = 0.0, 0, 0
    hits = loads = 0
    sizes, kinds = [], []
    while nth < len(requests) or queue or running:
        while nth < len(requests) and requests[nth].arrival <= clock:
            queue.append(requests[nth])
            nth += 1
        new: list[Simulated] = []
        if not running or steps >= wait:
            for r in policy.hopeless(queue, clock):
                r.aborted = True
                queue.remove(r)
            new = policy.select(queue, running, room, clock)
            for r in new:
                queue.remove(r)
            policy.admitted(new, len(queue))
        if new:
            resident = {r.adapter for r in running}
            missing = {r.adapter for r in new} - resident
            hits, loads = hits + len(new) - len(missing), loads + len(missing)
            clock += costs.cell * sum(4 * rank(a) for a in missing) + costs.prefill * sum(len(r.prompt) for r in new)
            for r in new:
                r.first, r.count = clock, 1
                policy.served(r, 1)
            running += new
            steps = 0
        elif running:
            clock += costs.step + costs.request * len(running)
            sizes.append(len(running))
            kinds.append(len({r.adapter for r in running}))
            for r in running:
                r.count += 1
                policy.served(r, 1)
            steps = min(steps + 1, wait)
        else:
            clock = max(clock, requests[nth].arrival) if nth < len(requests) else clock + 0.01
            if nth >= len(requests) and not queue:
                break
        for r in running:
            r.finished = clock if r.left <= 0 else None
        running = [r for r in running if r.finished is None]
    done = [r for r in requests if r.finished is not None]
    firsts = [r.first - r.arrival for r in done]
    return Metrics(
        len(done) / clock,
        float(np.mean([r.finished - r.arrival for r in done])),
        float(np.mean(firsts)),
        float(np.percentile(firsts, 50)),
        float(np.percentile(firsts, 90)),
        sum(f < deadline for f in firsts) / len(requests),
        sum(satisfaction(f, deadline) for f in firsts) / len(requests),
        sum(r.aborted for r in requests),
        hits / max(1, hits + loads),
        float(np.mean(sizes)),
        float(np.mean(kinds)),
    )
