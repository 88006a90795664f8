"""CUDA C++ sources compiled at first use by NVRTC, and launched through the driver.

NVRTC comes with every CUDA build of PyTorch; nvcc and a host compiler need not be there. A kernel is compiled once for every device architecture and
process (a second or two), so a first call belongs before anything that is timed or captured in a graph. Launches are plain kernel nodes:
a CUDA graph captures them.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import struct
from collections.abc import Sequence

import torch

INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT: a thread's first call may find no context."""
_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
TENSOR_MAP_BYTES = 128
_TENSOR_MAP_ALIGNMENT = 64


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _compiler() -> ctypes.CDLL:
    """NVRTC of the CUDA release that torch was built with: as the loader finds it, else from the wheel that torch depends on."""
    name = f"libnvrtc.so.{str(torch.version.cuda).split('.', 1)[0]}"
    beside_torch = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "nvidia", "*", "lib", name)
    for path in (name, *sorted(glob.glob(beside_torch))):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise OSError(f"no {name}: it comes with CUDA builds of torch (package nvidia-cuda-nvrtc)")


def check(status: int, call: str) -> None:
    """Raises RuntimeError unless a driver call returned CUDA_SUCCESS."""
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{call}: CUDA error {status} ({text.value.decode() if text.value else 'unknown'})")


def compile_source(source: str, options: Sequence[str]) -> bytes:
    """Machine code (cubin) of a CUDA C++ source.

    Raises:
        RuntimeError: It does not compile; the compiler's log is in the message.
    """
    nvrtc = _compiler()
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        raise RuntimeError("nvrtcCreateProgram failed")
    try:
        flags = [option.encode() for option in options]
        status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        if status:
            raise RuntimeError(f"NVRTC error {status}:\n{_bytes_of(nvrtc, 'ProgramLog', program).decode(errors='replace')}")
        return _bytes_of(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes_of(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    nvrtc[f"nvrtcGet{what}"](program, buffer)
    return buffer.raw


@functools.lru_cache(maxsize=1024)
def row_tiles(address: int, num_rows: int, rows_in_tile: int) -> bytes:
    """A matrix of rows of 128 bytes, as the bulk copy engine wants it described (a CUtensorMap): passed to a kernel by value.

    Tiles are whole rows, laid into shared memory with the 128-byte swizzle; rows past the end read as zero.

    Args:
        address: Of the first row, on the device; rows are contiguous.
        num_rows: How many there are.
        rows_in_tile: At most 256.
    """
    backing = (ctypes.c_uint8 * (TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT))()
    at = ctypes.addressof(backing) + -ctypes.addressof(backing) % _TENSOR_MAP_ALIGNMENT
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        0,  # bytes
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(128, num_rows),
        (ctypes.c_uint64 * 1)(128),
        (ctypes.c_uint32 * 2)(128, rows_in_tile),
        (ctypes.c_uint32 * 2)(1, 1),
        0,  # not interleaved
        3,  # swizzle of 128 bytes
        2,  # fetched into L2 in pieces of 128 bytes
        0,  # zeros out of bounds
    )
    check(status, "cuTensorMapEncodeTiled")
    return ctypes.string_at(at, TENSOR_MAP_BYTES)


class Kernel:
    """One `extern "C"` kernel of a source.

    Args:
        name: Of the kernel.
        source: CUDA C++ without includes.
        defines: `NAME=VALUE`.
        threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.
        parameters: Formats of the kernel's parameters, as in `struct`: "Q" for an address.
    """

    def __init__(
        self, name: str, source: str, defines: Sequence[str], threads: int, shared_bytes: int, parameters: Sequence[str]
    ) -> None:
        self.name, self.source, self.defines = name, source, tuple(defines)
        self.threads, self.shared_bytes = threads, shared_bytes
        self._layout = struct.Struct("".join(parameters))
        ends = (struct.calcsize("".join(parameters[: i + 1])) for i in range(len(parameters)))
        self._offsets = tuple(end - struct.calcsize(one) for end, one in zip(ends, parameters, strict=True))
        self._functions: dict[int, ctypes.c_void_p] = {}

    def launch(self, device: torch.device, blocks: int, *parameters: bytes | int) -> None:
        """On the current stream."""
        index = device.index
        function = self._functions.get(index) or self._load(index)
        packed = self._layout.pack(*parameters)
        base = ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value or 0
        addresses = (ctypes.c_void_p * len(self._offsets))(*(base + offset for offset in self._offsets))
        stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
        shape = (blocks, 1, 1, self.threads, 1, 1, self.shared_bytes)
        status = _driver().cuLaunchKernel(function, *shape, stream, addresses, None)
        if status == INVALID_CONTEXT:
            _make_current(index)
            status = _driver().cuLaunchKernel(function, *shape, stream, addresses, None)
        check(status, self.name)

    def _load(self, index: int) -> ctypes.c_void_p:
        major, minor = capability(index)
        architecture = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
        options = (f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{define}" for define in self.defines))
        code = compile_source(self.source, options)
        _make_current(index)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        check(_driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        check(_driver().cuModuleGetFunction(ctypes.byref(function), module, self.name.encode()), "cuModuleGetFunction")
        check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, self.shared_bytes), "cuFuncSetAttribute")
        self._functions[index] = function
        return function


def _make_current(index: int) -> None:
    """The device's primary context, torch's own, for this thread."""
    context, device = ctypes.c_void_p(), ctypes.c_int()
    check(_driver().cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


@functools.cache
def count_sms(index: int) -> int:
    """Multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Of a device, such as (9, 0) for Hopper."""
    return torch.cuda.get_device_capability(index)
