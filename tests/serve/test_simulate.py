"""The sheet's workload generator, simulator and what the policies reach on it (sheet 143, oracles 6 to 12)."""

import random

import pytest

from veneer.serve.admission import Room, peak
from veneer.serve.policies.catalogue import POLICIES
from veneer.serve.policies.eviction import least_worth
from veneer.serve.simulate import Arrival, Simulated, gamma_power, run, satisfaction


def test_the_workload_is_the_published_one():
    trace = gamma_power(32, 0.3, 2.0, 1.0)
    assert [a.adapter for a in trace[:8]] == [1, 27, 11, 5, 0, 0, 0, 19]
    assert [a.inputs for a in trace[:5]] == [12, 473, 99, 177, 324]
    assert [a.outputs for a in trace[:5]] == [410, 43, 292, 195, 89]
    assert [round(a.time, 4) for a in trace[:5]] == [0.1598, 3.0856, 3.3633, 3.6635, 3.7529]
    assert len(trace) == 600 and trace[-1].time == pytest.approx(301.0049, abs=1e-4)


def test_satisfaction_falls_with_the_square_of_the_wait():
    assert [round(satisfaction(t), 3) for t in (0, 1, 3, 5, 6)] == [1, 0.972, 0.75, 0.306, 0]


def simulated(inputs, outputs, done, adapter, arrival=0.0):
    request = Simulated(Arrival(arrival, adapter, inputs, outputs))
    request.count = done
    return request


@pytest.mark.parametrize(("cells", "fits"), [(200, True), (170, False)])
def test_admission_reckons_with_the_peak_of_all_future_ends(cells, fits):
    running = [simulated(8, 8, 2, "a"), simulated(15, 8, 5, "b")]
    assert [(r.length, r.left - 1) for r in running] == [(10, 5), (20, 2)]
    assert peak([10, 20, 9], [5, 2, 3]) == 45
    room = Room(cells, lambda a: [(a, 4 * {"a": 8, "b": 8, "c": 16}[a])])
    assert room.fits(running, [simulated(8, 4, 0, "c")]) is fits


# (throughput, mean first-token s, attainment, aborts) of the sheet's simulator.
SHEET = {
    (1, "fcfs"): (1.65, 17.6, 0.35, 0),
    (1, "lifo"): (1.65, 16.5, 0.79, 0),
    (1, "abort"): (1.63, 1.35, 0.88, 74),
    (4, "fcfs"): (1.46, 16.6, 0.44, 0),
    (4, "lifo"): (1.46, 18.2, 0.64, 0),
    (4, "abort"): (1.20, 1.40, 0.74, 157),
    (8, "fcfs"): (1.21, 17.5, 0.31, 0),
    (8, "lifo"): (1.21, 18.3, 0.51, 0),
    (8, "abort"): (0.86, 2.09, 0.65, 210),
}


@pytest.mark.parametrize(("cv", "name"), SHEET)
def test_policies_reach_what_the_sheet_found(cv, name):
    throughput, first, attainment, _ = SHEET[cv, name]
    found = run(gamma_power(200, 1.0, 2.0, cv), POLICIES[name]())
    assert found.throughput == pytest.approx(throughput, rel=0.05)
    assert found.attainment == pytest.approx(attainment, abs=0.03)
    if name != "abort":
        assert found.first_token == pytest.approx(first, rel=0.01)


def test_early_abort_never_starts_who_has_waited_too_long():
    policy = POLICIES["abort"]()
    waiting = [simulated(8, 8, 0, 0, arrival=t) for t in (0.0, 0.4, 0.6, 3.0)]
    assert policy.hopeless(waiting, 6.0) == waiting[:2]


def test_clustering_keeps_to_its_number_of_adapters_while_they_fill_the_batch():
    policy, room = POLICIES["clustering"](adapters=2), Room(100_000, lambda a: [(a, 4)], most=6)
    waiting = [simulated(8, 8, 0, n % 4) for n in range(16)]
    assert {r.adapter for r in policy.select(waiting, [], room, 0.0)} == {0, 1}
    few = [simulated(8, 8, 0, a) for a in (1, 2, 3, 1)]
    assert [r.adapter for r in policy.select(few, [simulated(8, 8, 1, 0)], room, 0.0)] == [1, 1, 2, 3]


def test_two_adapters_with_endless_requests_get_equal_service():
    policy, room = POLICIES["fair"](), Room(100_000, lambda a: [(a, 4)], most=4)
    waiting = [simulated(100, 20, 0, "greedy") for _ in range(200)] + [
        simulated(10, 20, 0, "modest") for _ in range(200)
    ]
    got = {"greedy": 0.0, "modest": 0.0}
    for _ in range(40):
        new = policy.select(waiting, [], room, 0.0)
        for r in new:
            waiting.remove(r)
        policy.admitted(new, len(waiting))
        for r in new:
            policy.served(r, 20)
            got[r.adapter] += len(r.prompt) + 2 * 20
    assert abs(got["greedy"] - got["modest"]) <= 4 * 140


def test_eviction_by_worth_keeps_what_would_cost_most_to_read_again():
    class Entry:
        def __init__(self, size, rate, used=0.0):
            self.size, self.rate, self.used = size, rate, used

    large, rare, good = Entry(100, 1.0), Entry(10, 0.01), Entry(10, 1.0)
    assert least_worth([good, large, rare], 10.0) == [rare, good, large]


def test_what_is_admitted_never_outgrows_the_pool():
    random.seed(0)
    for name in ("fcfs", "lifo", "clustering", "fair"):
        policy, cells = POLICIES[name](), 3000
        room = Room(cells, lambda a: [(a, 4 * (8, 16, 32)[a % 3])])
        waiting = [
            simulated(random.randint(1, 200), random.randint(1, 100), 0, random.randrange(9)) for _ in range(150)
        ]
        running = []
        while waiting or running:
            new = policy.select(waiting, running, room, 0.0)
            assert new or running
            for r in new:
                waiting.remove(r)
            policy.admitted(new, len(waiting))
            running += new
            for r in new or running:
                r.count += 1
            stored = sum(r.length - 1 for r in running)  # the newest token is not read yet
            assert stored + sum(4 * (8, 16, 32)[a % 3] for a in {r.adapter for r in running}) <= cells
            running = [r for r in running if r.left > 0]
