"""First come, first served."""

from veneer.serve.policies.policy import Policy


class FCFS(Policy):
    """In order of arrival; fair to requests, and a long queue makes every one of them late."""

    name = "fcfs"

    def order(self, waiting, running, now):
        return list(waiting)
