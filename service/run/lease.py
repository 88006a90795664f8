"""The lease: one run at a time on a cluster, so that two never time each other.

A named actor in Ray namespace `cplab`. It is not detached: Ray ends it with the driver that made it, whatever that dies of, and the name is
free again. It runs on its driver's node, so it can see whether the driver still moves, and end it when somebody says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError
from experiments.spec.measurement import MeasurementSpec
from service.errors import InfrastructureError
from service.run.controller import Observer
from service.run.rank_group import REPLY_GRACE_S
from service.run.tasks import Action, Task

NAMESPACE = "cplab"
NAME = "lease"
ANSWER_TIMEOUT_S = 30.0
POLL_S = 1.0
GRACE_S = 60.0
"""How much later than its longest step a holder's next heartbeat may come: groups that are lost are ended, and made anew, in between."""


@dataclass(frozen=True)
class Holder:
    """Who holds the lease, as it answers for itself.

    Attributes:
        sweep_id: Being run; `experiment` is its name, `home` where its records are.
        held_s: Since when.
        doing: By its last heartbeat, which is `silent_s` old; the next is due within `due_s` of it.
        is_stopped: The driver's process does not run (SIGSTOP, a debugger).
    """

    sweep_id: str
    experiment: str
    home: str
    host: str
    pid: int
    held_s: float
    doing: str
    silent_s: float
    due_s: float
    is_stopped: bool

    @property
    def is_frozen(self) -> bool:
        return self.is_stopped or self.silent_s > self.due_s + GRACE_S

    @property
    def words(self) -> str:
        """One line."""
        state = "frozen: its process is stopped" if self.is_stopped else "frozen" if self.is_frozen else "alive"
        return (
            f"sweep {self.sweep_id} ({self.experiment}, pid {self.pid} on {self.host}) for {self.held_s:.0f} s; "
            f"{state}, last heartbeat {self.silent_s:.0f} s ago: {self.doing}"
        )


class LeaseKeeper:
    """The actor. It tells ages, not times: clocks of other hosts may differ."""

    def __init__(self, told: dict[str, Any], driver_pid: int) -> None:
        import psutil

        self._told, self._driver = told, psutil.Process(driver_pid)  # with its start: a reused pid is another process
        self._began_s = self._beat_s = time.monotonic()
        self._doing, self._due_s = "starting", ANSWER_TIMEOUT_S

    def beat(self, doing: str, due_s: float) -> None:
        self._doing, self._due_s, self._beat_s = doing, due_s, time.monotonic()

    def who(self) -> dict[str, Any]:
        now_s = time.monotonic()
        return {
            **self._told,
            "held_s": now_s - self._began_s,
            "doing": self._doing,
            "silent_s": now_s - self._beat_s,
            "due_s": self._due_s,
            "is_stopped": self._is_stopped(),
        }

    def end_driver(self) -> None:
        """Ray ends all that is the driver's after it, and this actor too."""
        self._driver.send_signal(signal.SIGKILL)

    def _is_stopped(self) -> bool:
        import psutil

        try:
            return bool(self._driver.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
        except psutil.NoSuchProcess:
            return False


class Heartbeats(Observer):
    """Tells the lease what is done, between blocks: never inside a timed one. Stops the sweep when the lease is gone."""

    def __init__(self, keeper: Any, plan: MeasurementSpec) -> None:
        self._keeper, self._plan = keeper, plan
        self._last: Any = None

    def task_started(self, task: Task) -> None:
        """
        Raises:
            InfrastructureError: The lease is lost: another run may be timing by now.
        """
        import ray

        if self._last is not None and ray.wait([self._last], timeout=0)[0]:
            try:
                ray.get(self._last)
            except ray.exceptions.RayError as error:
                raise InfrastructureError(f"the lease was lost: {' '.join(str(error).split())[:200]}") from None
        where = f" {task.cell.label}" if task.cell is not None else ""
        self._last = self._keeper.beat.remote(f"launch {task.launch + 1}: {task.action}{where}", longest_s(task, self._plan))


def longest_s(task: Task, plan: MeasurementSpec) -> float:
    """What a task may take before it has failed by itself."""
    if task.action is Action.LAUNCH:
        return 4 * (plan.launch_timeout_s + REPLY_GRACE_S)  # placing, owners, ranks, the rendezvous
    requests = plan.max_warmup_blocks if task.action is Action.WARM_UP else 1
    return requests * (plan.block_timeout_s + REPLY_GRACE_S)


@contextlib.contextmanager
def lease(sweep_id: str, experiment: str, home: str, wait: bool, say: Callable[[str], None]) -> Iterator[Any]:
    """Holds the connected cluster's lease for the time of the context; gives its keeper. `wait`: until it is free, and say for whom.

    Raises:
        InfrastructureError: Another run holds it, and `wait` is off.
    """
    import ray

    told = {"sweep_id": sweep_id, "experiment": experiment, "home": home, "host": socket.gethostname(), "pid": os.getpid()}
    said = ""
    while (keeper := _take(told)) is None:
        holder = who_holds()
        if holder is not None and not wait:
            advice = "`cplab unlock --why ...` ends it" if holder.is_frozen else "--wait waits for it"
            raise InfrastructureError(f"the cluster is taken by {holder.words}; {advice}")
        if holder is not None and said != (said := f"{holder.sweep_id} {holder.is_frozen}"):
            say(f"waiting: the cluster is taken by {holder.words}")
        time.sleep(POLL_S)
    try:
        yield keeper
    finally:
        ray.kill(keeper)


def _take(told: dict[str, Any]) -> Any | None:
    """The keeper, once it answers; None when there is one already."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_restarts=0)(LeaseKeeper)
    try:
        keeper = remote.options(name=NAME, namespace=NAMESPACE, scheduling_strategy=here).remote(told, os.getpid())
        ray.get(keeper.who.remote(), timeout=ANSWER_TIMEOUT_S)
    except ValueError:  # the name is taken
        return None
    except ray.exceptions.RayError as error:
        raise InfrastructureError(f"the lease did not come up: {' '.join(str(error).split())[:300]}") from None
    return keeper


def who_holds() -> Holder | None:
    """The holder of the connected cluster's lease; None when it is free.

    Raises:
        InfrastructureError: It is held, and its keeper does not answer.
    """
    import ray

    try:
        keeper = ray.get_actor(NAME, namespace=NAMESPACE)
    except (ValueError, AssertionError):
        return None  # free, or about to be: Ray 2.60 asserts where an actor's class has gone with its driver before the actor
    try:
        return Holder(**ray.get(keeper.who.remote(), timeout=ANSWER_TIMEOUT_S))
    except ray.exceptions.RayActorError:
        return None  # about to be free
    except ray.exceptions.GetTimeoutError:
        raise InfrastructureError(f"the lease is held, and did not say by whom within {ANSWER_TIMEOUT_S:g} s") from None


def unlock(force: bool = False) -> Holder | None:
    """Ends a frozen holder: its driver is killed, and Ray ends all that was the driver's. Who it was; None when the lease was free.

    Raises:
        UserError: The holder is alive, and `force` is off.
        InfrastructureError: It could not be ended.
    """
    import ray

    holder = who_holds()
    if holder is None:
        return None
    if not holder.is_frozen and not force:
        raise UserError(f"unlock: the cluster is taken by {holder.words}; end that run itself, or say --force")
    keeper = ray.get_actor(NAME, namespace=NAMESPACE)
    try:
        ray.get(keeper.end_driver.remote(), timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayActorError:
        pass  # it went with its driver before it could answer
    except ray.exceptions.RayError as error:
        raise InfrastructureError(f"the holder could not be ended: {' '.join(str(error).split())[:300]}") from None
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    while who_holds() is not None:
        if time.monotonic() > deadline_s:
            raise InfrastructureError(f"the holder was killed, and the lease is not free after {ANSWER_TIMEOUT_S:g} s")
        time.sleep(0.2)
    return holder
