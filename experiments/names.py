"""The vocabulary: every name that a spec may use, and every name that a result carries.

`workers` registers a function or class under each name of a schedule, a split, a fabric, a device and a stage set; a test asserts that both sets
are equal, so a wrong name is refused here, without importing torch.
"""

from __future__ import annotations

from enum import StrEnum


class Schedule(StrEnum):
    """The order of the indexer's stages and the launch point of the gather."""

    SERIAL = "serial"
    """The code before SGLang PR #20438: both rotations, then the gather on the main lane."""
    OVERLAP_ROTATE = "overlap_rotate"
    """SGLang PR #20438: rotate k, gather on the side lane under the rotation of q, join at once. A host that runs ahead of its device enqueues
    q's rotation first, as the PR does."""
    OVERLAP_GATHER_FIRST = "overlap_gather_first"
    """The same launch point, with the gather enqueued before q's rotation: kernels that fill the chip cannot starve it."""
    OVERLAP_QUERY = "overlap_query"
    """Launched before wq_b, with k's RoPE apart from q's: the whole query branch to hide behind."""
    OVERLAP_ROTATE_CONTIGUOUS = "overlap_rotate_contiguous"
    """PR #20438's order with one more copy of k before its gather: what the `.contiguous()` that its review doubted costs where it copies."""


class Split(StrEnum):
    """Which rank owns which token of a step."""

    ZIGZAG = "zigzag"
    """SGLang's in-seq-split: 2c contiguous blocks a sequence; rank r owns blocks r and 2c-1-r."""
    INTERLEAVE = "interleave"
    """SGLang's round-robin-split: token i of the step belongs to rank i mod c."""


class FabricKind(StrEnum):
    """The links between ranks."""

    PROCESS_GROUP = "process_group"
    """torch.distributed over whatever links there are."""
    EMULATED = "emulated"
    """The same gather, which ends no earlier than a stated link model says."""
    ONE_RANK = "one_rank"
    """One real rank on a GPU; its peers' keys are written into its buffer at the pace of a stated link model. It knows no skew."""


class Mover(StrEnum):
    """What plays the peers of a one_rank fabric."""

    CTA_WRITER = "cta_writer"
    """A kernel of as many CTAs as the collective it stands for: NVLink, where a gather takes SMs from the kernels beside it."""
    HOST_DMA = "host_dma"
    """Copies from pinned host memory by a copy engine: a NIC that writes into the GPU's memory without SMs."""


class Device(StrEnum):
    """Where the lanes run."""

    CPU = "cpu"
    CUDA = "cuda"
    SIMULATED = "simulated"
    """A virtual clock over planted stage times: the same schedules, no real time."""


class Scope(StrEnum):
    """What is timed."""

    QK = "qk"
    """x and q_lora to rotated q and gathered bf16 k: what the PR touches."""
    KEY_READY = "key_ready"
    """To the quantised index keys in the cache."""
    INDEXER = "indexer"
    """Through top-k."""


class Regime(StrEnum):
    """How trials follow each other."""

    DRAINED = "drained"
    """Ranks idle and aligned before every trial."""
    STREAMING = "streaming"
    """A chain of layers back to back, each on what the one before it made; no barrier between them."""


class Payload(StrEnum):
    """What crosses the wire."""

    BF16 = "bf16"
    """Rotated keys, 256 B a token."""
    FP8 = "fp8"
    """Keys quantised before the wire, with their scale, 132 B a token (SGLang #20534)."""


class Stages(StrEnum):
    """How the indexer's stages are cut into kernels."""

    SEPARATE = "separate"
    """One kernel a stage, as SGLang runs DeepSeek-V3.2: the rotation of q, which the PR's gather hides behind, is a kernel of its own."""
    FUSED = "fused"
    """RoPE, rotation and quantisation of q in one kernel, as where indexer fusion is on: nothing is left between launch point and join."""


class Logits(StrEnum):
    """Whose kernel scores the keys."""

    CPLAB = "cplab"
    """Ours: torch's products where a device has no kernel of ours."""
    DEEPGEMM = "deepgemm"
    """DeepGEMM's `fp8_mqa_logits`, the one SGLang calls, where its package is installed. Its sums are grouped otherwise: bits of its own."""


class Execution(StrEnum):
    """How a trial's kernels get to the device."""

    EAGER = "eager"
    CUDA_GRAPH = "cuda_graph"
    """Captured once, replayed as one launch."""


class Transport(StrEnum):
    """Who moves it."""

    COLLECTIVE = "collective"
    """NCCL's or gloo's all-gather; NCCL's is a kernel, and takes SMs."""
    SYMMETRIC_MEMORY = "symmetric_memory"
    """Every rank copies its rows into its peers' memory by copy engines; SMs serve for one small barrier alone."""


class Control(StrEnum):
    """How a trial departs from the arm it belongs to; the accounting needs all of them."""

    NONE = "none"
    PREFILLED = "prefilled"
    """C_a: the gather returns at once a prefilled, correct buffer in token order."""
    ZERO_BYTE = "zero_byte"
    """The arm's real fork and join around a gather that moves nothing."""
    GATHER_ALONE = "gather_alone"
    """Only the gather, on the main lane."""


class Lane(StrEnum):
    """Where a stage runs on its rank."""

    MAIN = "main"
    SIDE = "side"


class Part(StrEnum):
    """What a trace shows besides the stages: what lies inside a gather, and the main lane's own share of one on the side lane."""

    FORK = "fork"
    """The launch point: the main lane hands the gather over."""
    JOIN = "join"
    """The main lane waits for the gather."""
    PAD = "pad"
    WIRE = "wire"
    RERANGE = "re-range"
    """Trim, and put the rows in token order."""
    WAIT = "planted wait"
    """An arm's stated extra wait, or a cell's stated skew."""


class Verdict(StrEnum):
    FASTER = "FASTER"
    SLOWER = "SLOWER"
    SAME = "SAME"
    UNRESOLVED = "UNRESOLVED"
    INVALID = "INVALID"


class SweepStatus(StrEnum):
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


BASELINE_ARM = "baseline"
"""The arm every other one is compared with; a spec must define it."""

AA_ARM = "_aa"
"""A second copy of the baseline that every run times beside it: whatever it seems to differ by is noise."""

METHODOLOGY_VERSION = 7
"""Rises with any change to what a published figure means; rows of different versions are refused for comparison."""
