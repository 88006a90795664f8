"""Kernels as PyTorch operators of the namespace `cplab`.

An operator's schema says what it reads and what it writes, so that PyTorch's CUDA stream sanitizer sees the kernels, which it would not see as
plain Python functions that launch. They are defined without `torch.library.custom_op`, whose own Python costs more than the launch. They have
no autograd formula and no fake implementation: nothing here is trained, and nothing is traced by a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = torch.library.Library("cplab", "FRAGMENT")


def operator(schema: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Defines `cplab::<schema>` with the decorated function as its CUDA implementation, and returns the operator in its place.

    Args:
        schema: Name, arguments and results, with every argument that is written marked, such as `fill(Tensor(a!) out, float value) -> ()`.
    """

    def define(function: Callable[P, R]) -> Callable[P, R]:
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CUDA")
        return cast("Callable[P, R]", getattr(torch.ops.cplab, name).default)

    return define
