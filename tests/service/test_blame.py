"""Whose fault a lost group is, from what failed and how every rank stands; then on real ranks, one of them frozen."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import Future

import pytest

from experiments.names import Device
from service.run import rank_group
from service.run.blame import Failure, culprit
from service.run.local_ranks import local_group
from service.run.rank_group import GroupLostError, RankGroup, Whereabouts
from workers.collective_log import CollectiveLog, Progress, blank, read_progress
from workers.messages import JoinGroup, Ping, RankFault, StoreOpen
from workers.standing import ProcessState, Standing

BROKEN = Failure(0, "RuntimeError: Connection closed by peer", RankFault("rank", "RuntimeError: Connection closed by peer", ""))
ITS_OWN = Failure(0, "ValueError: odd", RankFault("rank", "ValueError: odd", ""))
LATE = Failure(0, "no answer to RunBlock within 30 s", is_late=True)
DEAD = Failure(1, "the rank process 7 was killed by SIGKILL")


def alive(entered: int) -> Standing:
    return Standing(ProcessState.ALIVE, progress=Progress(entered, entered - 1, "all_gather", 5.0, "RunBlock, arm baseline"))


def out_of(left: int) -> Standing:
    return Standing(ProcessState.ALIVE, progress=Progress(left, left, "all_gather", 5.0, "RunBlock, arm baseline"))


STOPPED = Standing(ProcessState.STOPPED, "the rank process 7 is stopped", Progress(4, 4, "all_gather", 5.0, "RunBlock"))


@pytest.mark.parametrize(
    ("failures", "standings", "rank", "says"),
    [
        ([BROKEN, DEAD], [alive(5), None], 1, "killed by SIGKILL"),
        ([BROKEN], [alive(5), STOPPED], 1, "7 is stopped; RunBlock, out of collective 4 .*; rank 0: RuntimeError"),
        ([LATE], [alive(5), STOPPED], 1, "7 is stopped"),
        ([BROKEN], [alive(5), None], 1, "its owner, or the node, does not answer; rank 0: RuntimeError"),
        (
            [BROKEN],
            [alive(5), out_of(4)],
            1,
            "did not come to collective 5: RunBlock, arm baseline, out of collective 4 .*; rank 0: Runtime",
        ),
        (
            [BROKEN],
            [alive(5), alive(5)],
            0,
            "held inside collective 5: .* the link between them is cut or slow.*; RuntimeError: Connection",
        ),
        ([BROKEN], [alive(5), out_of(5)], 0, "held inside collective 5: every rank is alive and came to it: the link"),
        ([BROKEN], [out_of(5), alive(5)], 1, "held inside collective 5: every rank is alive and came to it: the link"),
        ([BROKEN], [alive(5), alive(4)], 1, "held inside collective 4: .* the link .*; rank 0: RuntimeError: Connection closed"),
        ([LATE], [alive(5), alive(5)], 0, "held inside collective 5"),
        ([ITS_OWN], [alive(5), out_of(5)], 0, "ValueError: odd$"),
        ([BROKEN], [out_of(5), out_of(5)], 0, "Connection closed by peer$"),
        ([BROKEN, Failure(1, "boom", RankFault("schedule", "boom", "", "mine"))], [alive(5), STOPPED], 1, "boom"),
    ],
)
def test_the_cause_is_named_and_not_who_complains_first(failures, standings, rank, says):
    named = culprit(failures, standings)
    assert named.rank == rank
    assert re.search(says, named.cause)


def test_the_log_of_collectives_is_read_from_outside(tmp_path):
    path = tmp_path / "page"
    blank(path)
    log = CollectiveLog(path)
    assert read_progress(path).words == "no collective entered yet"
    log.doing("RunBlock, arm overlapped")
    for _ in range(2):
        log.enter("barrier")
        log.leave()
    log.enter("all_gather")
    found = read_progress(path)
    assert (found.entered, found.left, found.name) == (3, 2, "all_gather")
    assert found.words.startswith("RunBlock, arm overlapped, inside collective 3 (all_gather, entered 0.")
    log.doing("x" * 500)
    assert read_progress(path).doing == "x" * 96


@pytest.mark.timeout(90)
def test_a_frozen_rank_is_named_though_its_peer_is_the_one_who_fails(groups):
    group = local_group(2)
    groups.append(group)
    group.launch(60, 2, Device.CPU, [])
    frozen = group.joined[1].pid
    os.kill(frozen, signal.SIGSTOP)
    # Both are asked to meet: the one that lives waits in the collective until its time is over.
    store = StoreOpen("127.0.0.1", 1)
    joins = [JoinGroup(rank, 2, store, "lo", "gloo", 2, 1, Device.CPU, rank, 2) for rank in range(2)]
    with pytest.raises(GroupLostError, match=rf"^rank 1 .*rank process {frozen} is stopped") as caught:
        group.ask(joins, 4)
    assert f"rank 1: the rank process {frozen} is stopped" in caught.value.evidence
    assert "rank 0: alive" in caught.value.evidence
    assert not os.path.exists(f"/proc/{frozen}")


class Instant:
    """A rank that is played, whose answers come in the order that the test wants."""

    where = Whereabouts("n", "h", "a", "lo", 1, 1, 0)

    def __init__(self, futures: list[Future]) -> None:
        self.futures = futures

    def ask(self, request, timeout_s):
        self.futures.append(Future())
        return self.futures[-1]


def test_answers_may_come_in_any_order():
    futures: list[Future] = []
    group = RankGroup([Instant(futures) for _ in range(3)])
    ask = Instant.ask

    def all_at_once(self, request, timeout_s):
        future = ask(self, request, timeout_s)
        if len(futures) == 3:
            for rank in (2, 0, 1):
                futures[rank].set_result(rank)
        return future

    Instant.ask = all_at_once
    try:
        assert group.ask(Ping(), 1) == [0, 1, 2]
    finally:
        Instant.ask = ask


class Unreachable:
    """A rank on a node that is cut off: whatever it is told, nothing comes back."""

    where = Whereabouts("n1", "h1", "a1", "lo", 1, 1, 0)

    def ask(self, request, timeout_s):
        return Future()

    standing = kill_rank = lambda self: Future()


class Complaining(Instant):
    """A rank whose peer does not come to the collective."""

    def ask(self, request, timeout_s):
        return answered(BROKEN.fault)

    def standing(self):
        return answered(alive(5))

    def kill_rank(self):
        self.futures.append(answered(None))
        return self.futures[-1]


def answered(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


@pytest.mark.timeout(60)
def test_a_group_with_a_node_cut_off_is_given_up_without_waiting_for_that_node(monkeypatch):
    monkeypatch.setattr(rank_group, "KILL_S", 3600.0)
    killed: list[Future] = []
    group = RankGroup([Complaining(killed), Unreachable()])
    with pytest.raises(
        GroupLostError, match=r"^rank 1 on h1 \(a1\).*: its owner, or the node, does not answer; rank 0: RuntimeError"
    ):
        group.ask(Ping(), 30)
    assert len(killed) == 1, "those that can be reached are ended"
