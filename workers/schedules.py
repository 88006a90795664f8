"""Schedules: the order of the indexer's stages and the launch point of the gather.

Each is a function of (indexer, shard, fabric) that reads like the algorithm and returns rotated q, bf16 [T, H, D], and gathered rotated k,
bf16 [S, D]. The launch order is part of a schedule: on a GPU, kernels that fill the chip starve a collective enqueued after them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TypeAlias

import torch

from experiments.errors import SpecError
from experiments.names import Schedule
from workers.fabrics.exchange import Exchange
from workers.indexer.indexer import Indexer, Shard

ScheduleFunction: TypeAlias = Callable[[Indexer, Shard, Exchange], tuple[torch.Tensor, torch.Tensor]]


def serial(ix: Indexer, shard: Shard, fabric: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang before PR #20438 (and its fallback without a second stream): rotate q, rotate k, gather, all on the main lane."""
    q, k = ix.project(shard)
    q = ix.rotate(q)
    k = ix.rotate(k)
    return q, fabric.gather(k)


def overlap_rotate(ix: Indexer, shard: Shard, fabric: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang PR #20438: rotate k first, gather it on the side lane while the main lane rotates q, join at once.

    The PR's host lets the second stream wait for k, enqueues q's rotation, and only then the gather; `fork_gather` keeps that order.
    """
    q, k = ix.project(shard)
    gathering = fabric.fork_gather(ix.rotate(k))
    q = ix.rotate(q)
    return q, gathering.join()


def overlap_gather_first(ix: Indexer, shard: Shard, fabric: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """The PR's launch point, with the gather enqueued ahead of q's rotation."""
    q, k = ix.project(shard)
    gathering = fabric.start_gather(ix.rotate(k))
    q = ix.rotate(q)
    return q, gathering.join()


def overlap_query(ix: Indexer, shard: Shard, fabric: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole key branch first, and the gather under the whole query branch: wq_b, RoPE and rotation (Megatron-LM #5691 does the like)."""
    k = ix.rope_k(ix.project_k(shard), shard)
    gathering = fabric.start_gather(ix.rotate(k))
    q = ix.rotate(ix.rope_q(ix.project_q(shard), shard))
    return q, gathering.join()


def overlap_rotate_contiguous(ix: Indexer, shard: Shard, fabric: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """The PR's order with a copy of k before its gather, as the `.contiguous()` that its review doubted would make of a k that is not."""
    q, k = ix.project(shard)
    gathering = fabric.fork_gather(ix.copy(ix.rotate(k)))
    q = ix.rotate(q)
    return q, gathering.join()


SCHEDULES: dict[Schedule, ScheduleFunction] = {
    Schedule.SERIAL: serial,
    Schedule.OVERLAP_ROTATE: overlap_rotate,
    Schedule.OVERLAP_GATHER_FIRST: overlap_gather_first,
    Schedule.OVERLAP_QUERY: overlap_query,
    Schedule.OVERLAP_ROTATE_CONTIGUOUS: overlap_rotate_contiguous,
}


def resolve_schedule(name: str) -> ScheduleFunction:
    """The function behind a shipped name or `module:function`.

    Raises:
        SpecError: The module does not import, has no such function, or the function does not take (ix, shard, fabric).
    """
    module_name, separator, function_name = name.partition(":")
    if not separator:
        return SCHEDULES[Schedule(name)]
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way while it loads, or be a script
        hint = ""
        if module_name.endswith(".py"):
            hint = "; write it as in an import, without .py"
        elif isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            hint = "; modules are looked for in the working directory and among the installed ones"
        raise SpecError(f"schedule {name!r}: cannot import {module_name!r}: {type(error).__name__}: {error}{hint}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SpecError(f"schedule {name!r}: {module_name!r} has no function {function_name!r}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function in C may not say
        return function  # type: ignore[no-any-return]
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise SpecError(f"schedule {name!r}: {function_name!r} takes {signature}; a schedule takes (ix, shard, fabric)") from None
    return function  # type: ignore[no-any-return]
