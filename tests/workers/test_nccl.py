"""What is known of NCCL without a GPU: its log is read, and a group that it could not serve is refused by name."""

from __future__ import annotations

import os
import subprocess
from types import SimpleNamespace

import pytest

from experiments.errors import UserError
from workers.fabrics import gpus, nccl
from workers.fabrics.gpus import GpuMap, make_ready
from workers.fabrics.nccl import Choice, ChoiceLog, choices_in, words_of

LINE = "host:71:71 [0] NCCL INFO AllGather: {} Bytes -> Algo {} proto {} channel{{Lo..Hi}}={{0..{}}}{}\n"
PAIR = GpuMap(("a", "a"), ("boot", "boot"))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Given back as it was."""
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_a_log_tells_how_each_size_was_gathered():
    text = (
        LINE.format(1024, "RING", "LL", 0, "")
        + "host:71:71 [0] NCCL INFO AllReduce: 8 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..0}\n"
        + LINE.format(65536, "RING", "LL128", 3, " cgaClusterSize 4")
        + LINE.format(2048, "RING", "LL", 0, "")
    )
    choices = choices_in(text)
    assert choices == {1024: Choice("RING", "LL", 1), 2048: Choice("RING", "LL", 1), 65536: Choice("RING", "LL128", 4)}
    assert words_of(choices) == "RING LL on 1 CTA for 1024 to 2048 B a rank, RING LL128 on 4 CTAs for 65536 B a rank"
    assert words_of({}) == ""


class Library:
    """An NCCL that looks at its settings when it is told to, and writes as they say."""

    def __init__(self) -> None:
        self.out = None

    def look_again(self) -> None:
        is_asked = os.environ.get("NCCL_DEBUG") == "INFO"
        self.out = open(os.environ["NCCL_DEBUG_FILE"], "w") if is_asked else None  # noqa: SIM115  (it stays open)

    def gather(self, size: int) -> None:
        if self.out is not None:
            self.out.write(LINE.format(size, "RING", "LL", 0, ""))
            self.out.flush()


def test_a_log_is_on_only_while_it_is_listened_to(monkeypatch):
    library = Library()
    monkeypatch.setattr(nccl, "_resetting_function", lambda: library.look_again)
    log = ChoiceLog()
    for size in (64, 128):
        library.gather(7)
        with log.listening() as choices:
            library.gather(size)
        assert choices == {size: Choice("RING", "LL", 1)}
        assert library.out is None
    assert not [name for name in os.environ if name.startswith("NCCL_DEBUG")]


@pytest.mark.parametrize("why", ["a user's own log", "an NCCL that does not look again"])
def test_what_cannot_be_heard_is_left_alone(monkeypatch, why):
    library = Library()
    monkeypatch.setattr(nccl, "_resetting_function", lambda: library.look_again if "own" in why else None)
    if "own" in why:
        os.environ["NCCL_DEBUG"] = "WARN"
    with ChoiceLog().listening() as choices:
        library.gather(64)
    assert choices == {}
    assert os.environ.get("NCCL_DEBUG") == ("WARN" if "own" in why else None)
    assert "NCCL_DEBUG_FILE" not in os.environ


def test_gpus_are_counted():
    assert PAIR.words == "2 ranks sharing 1 GPU"
    assert GpuMap(("a", "b", "c", "d"), ("x", "x", "y", "y")).words == "4 ranks on 4 GPUs of 2 hosts"
    assert not GpuMap(("a", "b"), ("x", "y")).is_one_host


def test_an_older_nccl_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(nccl, "version", lambda: (2, 28, 9))
    with pytest.raises(UserError, match=r"2 ranks share GPUs, and NCCL 2.28.9 takes one rank a GPU: that needs NCCL 2.30"):
        make_ready(PAIR)


def test_sharing_without_mps_is_refused(monkeypatch):
    monkeypatch.setattr(nccl, "version", lambda: (2, 31, 2))
    monkeypatch.setattr(gpus, "is_under_mps", lambda: False)
    with pytest.raises(UserError, match=r"2 ranks sharing 1 GPU, and CUDA MPS is not on"):
        make_ready(PAIR)


def test_sharing_takes_no_multicast(monkeypatch):
    monkeypatch.setattr(nccl, "version", lambda: (2, 31, 2))
    monkeypatch.setattr(gpus, "is_under_mps", lambda: True)
    make_ready(PAIR)
    asked = {name: os.environ[name] for name in ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_NVLS_ENABLE")}
    assert asked == {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}


def test_gpus_of_ones_own_need_nothing_of_it(monkeypatch):
    monkeypatch.setattr(nccl, "version", lambda: (2, 28, 9))
    make_ready(GpuMap(("a", "b"), ("boot", "boot")))
    assert "NCCL_MULTI_RANK_GPU_ENABLE" not in os.environ


class Prober:
    """Stands in for the processes that ask an MPS server for a context: the first few are refused."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.asked = refusals, 0

    def run(self, *_: object, **__: object) -> SimpleNamespace:
        self.asked += 1
        return SimpleNamespace(returncode=int(self.asked <= self.refusals))


@pytest.mark.parametrize(("has_daemon", "refusals", "asked"), [(False, 0, 0), (True, 0, 1), (True, 3, 4)])
def test_a_rank_waits_until_an_mps_server_takes_it(monkeypatch, tmp_path, has_daemon, refusals, asked):
    prober = Prober(refusals)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", prober.run)
    monkeypatch.setattr(gpus, "PROBE_PAUSE_S", 0.001)
    if has_daemon:
        (tmp_path / "control").touch()
    gpus.wait_for_mps(60)
    assert prober.asked == asked


def test_a_server_that_takes_nobody_is_waited_for_in_vain(monkeypatch, tmp_path):
    (tmp_path / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    gpus.wait_for_mps(0.3)  # a machine without a driver is refused like one with a busy server
