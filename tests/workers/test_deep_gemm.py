"""What is said where DeepGEMM is asked for and cannot be had; its logits themselves are held to the references on a GPU (tests/workers/kernels)."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments.errors import UserError
from workers.kernels.deep_gemm import load_deep_gemm


@pytest.fixture(autouse=True)
def _asks_anew():
    load_deep_gemm.cache_clear()
    yield
    load_deep_gemm.cache_clear()


def test_a_package_that_is_not_there_is_named_with_the_key(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    with pytest.raises(
        UserError, match=r"arms\.\*\.logits deepgemm: the package deep_gemm does not load .*install a build of it for torch"
    ) as error:
        load_deep_gemm()
    assert "\n" not in str(error.value)


def test_a_package_built_for_another_torch_is_named(monkeypatch, tmp_path):
    (tmp_path / "deep_gemm.py").write_text("raise OSError('Could not load this library:\\n_C.so: undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    with pytest.raises(
        UserError, match=rf"\(_C\.so: undefined symbol: _ZN3c10\): install a build of it for torch {re.escape(torch.__version__)}"
    ) as error:
        load_deep_gemm()
    assert "\n" not in str(error.value)


def test_a_package_without_the_call_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(__version__="9.9"))
    with pytest.raises(UserError, match=r"deep_gemm 9\.9 has no fp8_mqa_logits"):
        load_deep_gemm()
