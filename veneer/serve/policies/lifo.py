"""Last come, first served."""

from veneer.serve.policies.policy import Policy


class LIFO(Policy):
    """Newest first: under overload many are on time and the rest very late."""

    name = "lifo"

    def order(self, waiting, running, now):
        return list(reversed(waiting))
