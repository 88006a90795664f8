"""Where ranks go: what each reserves, how many share a node, which nodes are good enough, and over which interface they talk."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


_Interface = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:@-]{1,15}$")]
_LabelKey = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$")
]
_VALUE = r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?"
_LabelSelector = Annotated[str, Field(pattern=rf"^(!?{_VALUE}|!?in\({_VALUE}(,{_VALUE})*\))$")]


class PlacementSpec(BaseModel):
    """Where ranks go. A stated topology (`ranks_per_node` or `nodes`) is exact: a run that cannot have it is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: str = Field("PACK", pattern="^(PACK|SPREAD|STRICT_PACK|STRICT_SPREAD)$")
    """What Ray tries for a group without a stated topology."""
    cpus_per_rank: float = Field(1.0, gt=0, le=1024)
    """Ray CPUs that a rank reserves. Below 1 ranks share cores: right for tests of behaviour, wrong for speed."""
    gpus_per_rank: float = Field(1.0, gt=0, le=1)
    """Ray GPUs that a rank reserves on device cuda. Below 1 ranks share a GPU: right for tests of behaviour, and every result says so."""
    ranks_per_node: int | None = Field(None, ge=1, le=1024)
    """So many ranks on every node, and a smaller group inside one node. With 8, cp_size 8 lies inside a node and cp_size 16 on two."""
    nodes: int | None = Field(None, ge=1, le=1024)
    """Every group lies evenly on so many nodes."""
    node_labels: dict[_LabelKey, _LabelSelector] = {}
    """Ray's node labels -> what they must be: `h100`, `!h100`, `in(h100,h200)` or `!in(h100,h200)`."""
    interfaces: Annotated[tuple[_Interface, ...], BeforeValidator(_listed)] = ()
    """Network interfaces for gloo and NCCL: each node takes the first of these that it has. None given: the one of the node's address."""

    @model_validator(mode="after")
    def _one_topology(self) -> Self:
        if self.ranks_per_node is not None and self.nodes is not None:
            raise ValueError(f"ranks_per_node {self.ranks_per_node} and nodes {self.nodes} both state a topology: drop one")
        if self.states_topology and self.strategy.startswith("STRICT"):
            stated = "ranks_per_node" if self.ranks_per_node is not None else "nodes"
            raise ValueError(f"strategy {self.strategy}: {stated} says exactly where ranks go: drop one")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came to this later and is not used stays out, so that hashes and stored specs are what they were without it."""
        later: dict[str, Any] = {"ranks_per_node": None, "nodes": None, "node_labels": {}, "interfaces": ()}
        return {key: value for key, value in handler(self).items() if key not in later or getattr(self, key) != later[key]}

    @property
    def states_topology(self) -> bool:
        return self.ranks_per_node is not None or self.nodes is not None

    def topology(self, num_ranks: int) -> tuple[int, ...] | None:
        """How many ranks each node has, for a group that `why_not` lets pass; None when nothing is stated."""
        if self.nodes is not None:
            return (num_ranks // self.nodes,) * self.nodes
        if self.ranks_per_node is not None:
            each = min(self.ranks_per_node, num_ranks)
            return (each,) * (num_ranks // each)
        return None

    def why_not(self, num_ranks: int) -> str | None:
        """Why so many ranks cannot lie as stated on any cluster; None when they can on some."""
        if self.nodes is not None and num_ranks % self.nodes:
            return f"nodes {self.nodes}: {num_ranks} ranks do not lie evenly on {self.nodes} nodes"
        each = self.ranks_per_node
        if each is not None and num_ranks > each and num_ranks % each:
            return f"ranks_per_node {each}: {num_ranks} ranks do not fill nodes of {each}"
        return None
