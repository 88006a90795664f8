"""The machine behind a result: what has to be equal for the numbers of two sweeps to be set side by side."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any


def machine_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """Processor, cores, and how the ranks of every cp_size lay on nodes; names of hosts are no hardware."""
    layouts: dict[int, set[str]] = defaultdict(set)
    for launch in environment.get("launches", []):
        nodes = Counter((rank.get("node_id"), rank.get("hostname")) for rank in launch["ranks"])
        cores = {str(rank["cores"]) for rank in launch["ranks"] if "cores" in rank}
        ranks = "+".join(str(count) for count in sorted(nodes.values(), reverse=True))
        layouts[launch["cp_size"]].add(f"{ranks} ranks on {len(nodes)} node(s) of {'/'.join(sorted(cores)) or '?'} cores")
    return {
        "cpu": str(environment.get("cpu")),
        "cores": str(environment.get("cores")),
        **{f"cp_size {size}": " or ".join(sorted(found)) for size, found in sorted(layouts.items())},
    }


def code_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """Revision and versions. The source digest stands for uncommitted changes, which a revision does not know of."""
    return {
        "revision": str(environment.get("revision")),
        "source digest": str(environment.get("source_digest")),
        **{name: str(version) for name, version in environment.get("versions", {}).items()},
    }


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What is not the same, of what both know."""
    return [f"{name} was {before[name]}, is {after[name]}" for name in before if name in after and before[name] != after[name]]
