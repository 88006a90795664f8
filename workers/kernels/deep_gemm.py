"""DeepGEMM's logits in the place of ours, where its package is installed: `logits: deepgemm`.

Source: `fp8_mqa_logits` of deepseek-ai/DeepGEMM, which SGLang's indexer calls; SGLang's own build is `sgl-deep-gemm`. Checked with its 0.1.0 under
torch 2.11. DeepGEMM's kernels are compiled by nvcc when first called, and kept where DG_JIT_CACHE_DIR says.

Legend: T query rows, N packed keys, H heads, D head dim.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from experiments.errors import UserError
from workers.kernels.operators import operator


@functools.cache
def load_deep_gemm() -> Any:
    """The package.

    Raises:
        UserError: It is not there, or not built for this torch.
    """
    try:
        package = importlib.import_module("deep_gemm")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"arms.*.logits deepgemm: the package deep_gemm does not load on this rank's node ({reason}): install a build of it for torch "
            f"{torch.__version__} there (pip install sgl-deep-gemm==0.1.0 goes with torch 2.11), or use logits cplab"
        ) from None
    if not hasattr(package, "fp8_mqa_logits"):
        version = getattr(package, "__version__", "of no stated version")
        raise UserError(
            f"arms.*.logits deepgemm: deep_gemm {version} has no fp8_mqa_logits: install one that has, or use logits cplab"
        )
    return package


@operator(
    "deep_gemm_logits(Tensor q8, Tensor k8, Tensor k_scale, Tensor gates, Tensor ks, Tensor ke, int num_sms, bool is_clean) -> Tensor"
)
def deep_gemm_logits(
    q8_THD: torch.Tensor,
    k8_ND: torch.Tensor,
    k_scale_N: torch.Tensor,
    gates_TH: torch.Tensor,
    ks_T: torch.Tensor,
    ke_T: torch.Tensor,
    num_sms: int,
    is_clean: bool,
) -> torch.Tensor:
    """fp32 [T, N], rows at a stride of DeepGEMM's choice. What stands outside [ks, ke) is -inf if `is_clean`, else anything.

    An operator, so that the CUDA stream sanitizer sees what a foreign launch reads.
    """
    package = load_deep_gemm()
    # A setting of the whole process, read when a kernel is enqueued.
    package.set_num_sms(num_sms)
    logits: torch.Tensor = package.fp8_mqa_logits(q8_THD, (k8_ND, k_scale_N), gates_TH, ks_T, ke_T, is_clean)
    return logits
