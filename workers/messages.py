"""What a rank is asked and what it answers. Small frozen dataclasses; never a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.names import Control, Device
from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.measurement import VerifySpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from workers.device_state import DeviceState
from workers.timeline import Span


@dataclass(frozen=True)
class Variant:
    """An arm, or an arm under one of the accounting's controls."""

    arm: str
    control: Control = Control.NONE

    @property
    def key(self) -> str:
        return self.arm if self.control is Control.NONE else f"{self.arm}/{self.control}"

    @classmethod
    def parse(cls, key: str) -> Variant:
        arm, _, control = key.partition("/")
        return cls(arm, Control(control) if control else Control.NONE)


@dataclass(frozen=True)
class OpenStore:
    """To rank 0: bind the rendezvous store on `host`, at a port that the system picks. Answer: StoreOpen."""

    host: str
    world_size: int
    timeout_s: float


@dataclass(frozen=True)
class StoreOpen:
    host: str
    port: int


@dataclass(frozen=True)
class JoinGroup:
    """To every rank: meet at the store and open the communicator. Answer: Joined."""

    rank: int
    world_size: int
    store: StoreOpen
    interface: str
    backend: str
    timeout_s: float
    num_threads: int
    device: Device
    node_index: int
    """Which of the ranks on its node this one is, of `node_ranks`."""
    node_ranks: int
    gpus: tuple[str, ...] = ()
    """Those of its node's ranks, its own first, as CUDA_VISIBLE_DEVICES names them. Empty: what it sees is shared out by `node_index`."""


@dataclass(frozen=True)
class Joined:
    rank: int
    pid: int
    boot_id: str
    """Ranks of one boot share a clock, which an emulated fabric needs."""
    path: str
    cores: tuple[int, ...]
    """Where the rank's threads run."""
    gpu: str = ""
    """The model of its device; empty on a CPU."""
    gpu_uuid: str = ""
    """Which one: two ranks of one UUID share it."""


@dataclass(frozen=True)
class PrepareCell:
    """Plans, weights, inputs and buffers of a cell. Answer: Prepared."""

    cell: Cell
    arms: dict[str, ArmSpec]
    weights: WeightsSpec
    seed: int
    num_inputs: int
    verify: VerifySpec
    simulation: SimulationSpec


@dataclass(frozen=True)
class Prepared:
    rank: int
    local_tokens: int
    received_bytes: tuple[int, ...]
    """Into this rank, in each step."""
    path: str


@dataclass(frozen=True)
class VerifyCell:
    """Check every arm against `serial`. Answer: VerifyReport.

    Attributes:
        deep: `serial` against the references as well, and every arm on every input.
        late: Every arm once more with its side lane held back, and once with its main lane: no race is then won by luck.
    """

    deep: bool
    late: bool = True


@dataclass(frozen=True)
class Fault:
    """Why a cell is INVALID: the arm (or `*` for what all arms share), what failed, and where."""

    arm: str
    check: str
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """One rank's checks.

    Attributes:
        key_digests: Digest of the quantised index keys for each checked (step, input): equal on all ranks.
        num_checks: Comparisons made; a report without any proves nothing.
        recall: Share of R2's top-k that the rank found, over the sampled rows; None when not deep.
        gates: R2 gates as (stage, worst, bound).
    """

    rank: int
    faults: tuple[Fault, ...]
    key_digests: tuple[int, ...]
    num_checks: int
    recall: float | None = None
    recall_unrounded: float | None = None
    gates: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class TrialOrder:
    """One trial to run: `row` is the row of the block's design that it belongs to."""

    variant: str
    row: int
    step: int


@dataclass(frozen=True)
class RunBlock:
    """Run these trials in this order. Answer: BlockReport."""

    orders: tuple[TrialOrder, ...]


@dataclass(frozen=True)
class TrialRow:
    """One trial on one rank, times in us, means over the layers of a chain (`start_us`: of the first); None where nothing of the kind ran."""

    variant: str
    row: int
    step: int
    elapsed_us: float
    start_us: float
    window_us: float
    gather_us: float | None
    wire_us: float | None
    arrival_us: float | None
    late_us: float | None
    filler_us: float | None = None
    enqueue_us: float | None = None


@dataclass(frozen=True)
class BlockReport:
    rank: int
    rows: tuple[TrialRow, ...]
    faults: tuple[Fault, ...]
    busy_us: float
    """The block's whole time on the rank; trials take part of it."""
    device_state: DeviceState | None = None
    """Of a GPU, right after the block."""


@dataclass(frozen=True)
class TraceCell:
    """Run one more trial of each of these arms and write down what ran where and when. Answer: TraceReport."""

    arms: tuple[str, ...]
    step: int
    shares_clock: bool
    """Whether all ranks read one clock already."""


@dataclass(frozen=True)
class ArmTrace:
    """One traced trial on one rank, on rank 0's clock: from the barrier to the end of the scope, and the spans in between."""

    arm: str
    start_ns: int
    end_ns: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class TraceReport:
    rank: int
    arms: tuple[ArmTrace, ...]
    faults: tuple[Fault, ...]
    offset_ns: int
    """What was added to this rank's clock."""
    uncertainty_ns: int
    """How far off that may be; 0 where ranks share a clock."""


@dataclass(frozen=True)
class RankFault:
    """The answer of a rank that could not do what it was asked."""

    kind: str
    """`schedule`: the arm's own code; `user`: a checkpoint and the like; `rank`: all else."""
    message: str
    trace: str
    arm: str = ""


@dataclass(frozen=True)
class Ping:
    """Answer: Pong."""


@dataclass(frozen=True)
class Pong:
    pid: int = field(default=0)


Request = OpenStore | JoinGroup | PrepareCell | VerifyCell | RunBlock | TraceCell | Ping
Answer = StoreOpen | Joined | Prepared | VerifyReport | BlockReport | TraceReport | RankFault | Pong
