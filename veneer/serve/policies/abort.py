"""Early abort: admission control for a deadline of the first token."""

from typing import Annotated

from veneer.fields import At, Fields
from veneer.serve.policies.policy import Policy


class EarlyAbort(Fields, Policy):
    """Sends away who can no longer be on time; newest first while more come than are admitted.

    S-LoRA §6: ``rate`` and ``batch`` are running averages (0.3 old, 0.7 new) of arrivals and admissions at each call.
    """

    name = "abort"
    deadline: Annotated[float, At(gt=0, doc="seconds to the first token")] = 6.0
    margin: Annotated[float, At(ge=0, doc="seconds that a prompt takes")] = 0.5

    def __init__(self, **fields):
        self.set_fields(fields)
        self.rate = self.batch = 1
        self._left = 0

    def hopeless(self, waiting, now):
        self.rate = int(0.7 * (len(waiting) - self._left) + 0.3 * self.rate)
        return [r for r in waiting if not r.generated and now - r.arrival + self.margin >= self.deadline]

    def order(self, waiting, running, now):
        return list(reversed(waiting)) if self.rate >= self.batch else list(waiting)

    def admitted(self, new, waiting):
        self._left = waiting
        if new:
            self.batch = max(int(0.7 * len(new) + 0.3 * self.batch), 1)
