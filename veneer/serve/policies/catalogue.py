"""The policies by name, as the command line offers them."""

from veneer.serve.policies.abort import EarlyAbort
from veneer.serve.policies.clustering import Clustering
from veneer.serve.policies.fair import Fair
from veneer.serve.policies.fcfs import FCFS
from veneer.serve.policies.lifo import LIFO

POLICIES = {p.name: p for p in (FCFS, LIFO, Clustering, EarlyAbort, Fair)}
