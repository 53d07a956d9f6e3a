"""Fair shares between adapters, by virtual token counters."""

from typing import Annotated

from veneer.fields import At, Fields
from veneer.serve.policies.policy import Policy


class Fair(Fields, Policy):
    """Serves the adapter that got least so far (VTC, Sheng et al. 2024): a prompt token costs 1, a generated one 2.

    An adapter that comes back from idleness starts at the least of the active counters: nobody saves up.
    ``weights`` gives adapters a larger share.
    """

    name = "fair"
    prompt_cost: Annotated[float, At(gt=0, doc="of a prompt token")] = 1.0
    token_cost: Annotated[float, At(gt=0, doc="of a generated token")] = 2.0

    def __init__(self, weights=None, **fields):
        self.set_fields(fields)
        self.weights = dict(weights or {})
        self.spent = {}
        self._active = set()

    def order(self, waiting, running, now):
        self._wake(waiting, running)
        spent, found = dict(self.spent), []
        queues = {}
        for request in waiting:
            queues.setdefault(request.adapter, []).append(request)
        while queues:
            adapter = min(queues, key=lambda a: (spent[a], queues[a][0].arrival))
            request = queues[adapter].pop(0)
            if not queues[adapter]:
                del queues[adapter]
            found.append(request)
            spent[adapter] += self._cost(adapter, len(request.prompt) * self.prompt_cost)
        return found

    def admitted(self, new, waiting):
        for r in new:
            self.spent[r.adapter] = self.spent.get(r.adapter, 0.0) + self._cost(
                r.adapter, len(r.prompt) * self.prompt_cost
            )

    def served(self, request, tokens):
        self.spent[request.adapter] = self.spent.get(request.adapter, 0.0) + self._cost(
            request.adapter, tokens * self.token_cost
        )

    def _wake(self, waiting, running):
        active = {r.adapter for r in waiting} | {r.adapter for r in running}
        least = min((self.spent[a] for a in active & self._active if a in self.spent), default=None)
        for adapter in active - self._active:
            known = self.spent.get(adapter, 0.0)
            self.spent[adapter] = known if least is None else max(known, least)
        self._active = active
        for adapter in [a for a in self.spent if a not in active and len(self.spent) > 10_000]:
            del self.spent[adapter]

    def _cost(self, adapter, cost):
        return cost / self.weights.get(adapter, 1.0)
