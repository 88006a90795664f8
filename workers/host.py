"""The parent of one rank process: starts it, asks it, and ends it. The parent always answers, whatever becomes of the rank.

A rank is forked from a server that has torch loaded already, so a launch costs well under a second, and a rank that is stuck in a
collective, or dead, never takes its owner along.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from workers.collective_log import blank, keep_in, read_progress
from workers.messages import Answer, Ping, Request
from workers.standing import ProcessState, Standing, is_stopped

_launching = threading.Lock()
"""A launch changes the environment and the main module for a moment; hosts of one process take turns."""

_PR_SET_PDEATHSIG = 1

PRELOAD = ["torch", "torch.distributed", "workers.rank"]


class RankLostError(Exception):
    """The rank process died, or did not answer in time."""


class RankHost:
    """Owns at most one rank process."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._process: ForkServerProcess | None = None
        self._connection: Connection | None = None
        self._files = [os.memfd_create(f"cplab-{name}") for name in ("stacks", "collectives")]
        # In memory, opened by the rank under its owner's name for them: nothing is left of either, however they end.
        self._stacks, self._collectives = (Path(f"/proc/{os.getpid()}/fd/{file}") for file in self._files)
        self._witness: Connection | None = None
        self._asking = threading.Lock()

    def launch(self, import_paths: Sequence[str] = (), timeout_s: float = 60) -> int:
        """A fresh rank process in place of the last one; its pid, once it listens. `import_paths`: where a user's schedule may be found.

        Raises:
            RankLostError: It did not come up in `timeout_s`.
        """
        self.kill()
        self._context.set_forkserver_preload(PRELOAD)
        blank(self._collectives)
        ours, theirs = self._context.Pipe()
        self._witness, testifying = self._context.Pipe()
        files = (str(self._stacks), str(self._collectives))
        with _launching, _environment_of_the_server(), _without_main_module():
            process = self._context.Process(
                target=_serve, args=(theirs, testifying, *files, tuple(import_paths)), name="cplab-rank", daemon=True
            )
            process.start()
        self._process = process  # once it can be killed: another thread may want to at any time
        theirs.close()
        testifying.close()
        self._connection = ours
        assert self._process.pid is not None
        if self._connection not in wait([self._connection, self._process.sentinel], timeout_s):
            self.kill()
            raise RankLostError(f"the rank process did not come up within {timeout_s:g} s")
        pid = self._process.pid
        try:
            self._connection.recv()  # its Pong: the stack handler is in place
        except (EOFError, OSError):
            self._process.join(1)
            raise RankLostError(f"{_obituary(self._process)} while it started; its own words are on stderr") from None
        return pid

    def ask(self, request: Request, timeout_s: float) -> Answer:
        """The rank's answer; a RankFault is one.

        Raises:
            RankLostError: It is dead, or `timeout_s` is over; it is not killed here, so that its stack can still be asked for.
        """
        process, connection = self._process, self._connection
        if process is None or connection is None:
            raise RankLostError("no rank process was launched")
        with self._asking:
            try:
                connection.send(request)
                ready = wait([connection, process.sentinel], timeout_s)
                if connection in ready:
                    answer: Answer = connection.recv()
                    return answer
            except (EOFError, OSError):
                process.join(1)
                raise RankLostError(_obituary(process)) from None
        if not ready:
            state = f"; the rank process {process.pid} is stopped" if process.pid and is_stopped(process.pid) else ""
            raise RankLostError(f"no answer to {type(request).__name__} within {timeout_s:g} s{state}")
        process.join(1)
        raise RankLostError(_obituary(process))

    def standing(self, wait_s: float = 1.0) -> Standing:
        """How the rank stands, whatever it does; takes about `wait_s` where it does not say so itself."""
        process, progress = self._process, read_progress(self._collectives)
        if process is None or process.pid is None:
            return Standing(ProcessState.DEAD, "no rank process was launched")
        if not process.is_alive():
            return Standing(ProcessState.DEAD, _obituary(process), progress)
        if is_stopped(process.pid):
            return Standing(ProcessState.STOPPED, f"the rank process {process.pid} is stopped", progress)
        stack = self.stack(wait_s / 2)
        said, record = self._testimony(wait_s / 2)
        return Standing(ProcessState.ALIVE, "", progress, stack or said, record)

    def stack(self, wait_s: float = 0.5) -> str:
        """Where every thread of the living rank stands; empty when it is dead or frozen."""
        process = self._process
        if process is None or not process.is_alive() or process.pid is None:
            return ""
        self._stacks.write_text("")
        os.kill(process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if text := self._stacks.read_text():
                return text
        return ""

    def _testimony(self, wait_s: float) -> tuple[str, str]:
        """(stacks, NCCL's flight record) by a thread of the rank; empty when nothing comes."""
        try:
            if self._witness is None:
                return "", ""
            self._witness.send("")
            if self._witness.poll(wait_s):
                stacks, record = self._witness.recv()
                return str(stacks), str(record)
        except (EOFError, OSError):
            pass
        return "", ""

    def kill(self) -> None:
        """Ends the rank process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
            self._process.close() if not self._process.is_alive() else None
        for connection in (self._connection, self._witness):
            if connection is not None:
                connection.close()
        self._process = self._connection = self._witness = None

    def close(self) -> None:
        self.kill()
        self._stacks = self._collectives = Path(os.devnull)  # their numbers are soon another file's
        while self._files:
            os.close(self._files.pop())


def _obituary(process: ForkServerProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"the rank process {process.pid} was killed by {signal.Signals(-code).name}"
    return f"the rank process {process.pid} ended with exit code {code}"


def _serve(connection: Connection, witness: Connection, stacks: str, collectives: str, import_paths: tuple[str, ...]) -> None:
    """The rank process: answers until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the controller's to handle
    _die_with_fork_server()
    keep_in(Path(collectives))
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "a"), all_threads=True)  # noqa: SIM115  (lives as long as the process)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    threading.Thread(target=_testify, args=(witness,), daemon=True).start()
    sys.path[:0] = [path for path in import_paths if path not in sys.path]
    from workers.rank import CPRank

    rank = CPRank()
    connection.send(rank.answer(Ping()))
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        answer = rank.answer(request)
        try:
            connection.send(answer)
        except (BrokenPipeError, OSError):
            os._exit(0)


def _die_with_fork_server() -> None:
    """By the kernel's hand: also a rank that is stopped, which no thread of its own could end. The server ends with its owner, once no child of it
    holds the writing end of the pipe that it watches, which every child inherits."""
    from multiprocessing import forkserver

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server = getattr(forkserver, "_forkserver", None)
    held = getattr(server, "_forkserver_alive_fd", None)
    if isinstance(held, int):
        os.close(held)
        server._forkserver_alive_fd = None  # type: ignore[union-attr]


def _testify(witness: Connection) -> None:
    """Says on request where this process stands, while its main thread may be stuck. The record is torch's JSON; its pickled form is never read."""
    from workers.flight_recorder import flight_record

    while True:
        try:
            witness.recv()
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
            witness.send((stacks, flight_record()))
        except (EOFError, OSError):
            return


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _environment_of_the_server() -> Iterator[None]:
    """What the fork server, a bare interpreter, starts with: our packages on its path, and a heap that keeps what it has.

    By default glibc gives a freed tensor back to the system, and the next one pays 2,000 to 14,000 page faults for the same memory: a
    rotation of 16,384 rows took 14 or 25 ms, which of them was drawn anew with every launch. Kept, it takes 12 ms with a hundredth of the
    spread. A CUDA allocator caches for the same reason.
    """
    root = str(Path(__file__).resolve().parent.parent)
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """A child imports its parent's main module first; ours is Ray's worker or the command line, a second of imports for nothing."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    try:
        if file is not None:
            del main.__file__
        main.__spec__ = None
        yield
    finally:
        if file is not None:
            main.__file__ = file
        main.__spec__ = spec
