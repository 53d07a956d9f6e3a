"""Adapter clustering: few adapters at once."""

from typing import Annotated

from veneer.fields import At, Fields
from veneer.serve.policies.policy import Policy


class Clustering(Fields, Policy):
    """In order of arrival until ``adapters`` different ones run; then those whose adapter runs already, then the rest.

    From S-LoRA's ``batch_num_adapters`` (8 is best in its data).
    """

    name = "clustering"
    adapters: Annotated[int, At(ge=1, doc="different adapters a batch, d")] = 8

    def __init__(self, **fields):
        self.set_fields(fields)

    def order(self, waiting, running, now):
        present = {r.adapter for r in running}
        first, rest = [], []
        for request in waiting:
            if request.adapter in present or len(present) < self.adapters:
                present.add(request.adapter)
                first.append(request)
            else:
                rest.append(request)
        return first + rest
