"""Reads a GPU's state by NVML, where its Python binding is installed."""

from __future__ import annotations

from typing import Any

import torch

from workers.device_state import SLOWDOWNS, DeviceState


class DeviceMonitor:
    """Reads the state of the current CUDA device."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml
        except ModuleNotFoundError:
            return
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._nvml = pynvml
            self.read()
        except pynvml.NVMLError:  # a driver that tells nothing, or only some of it
            self._nvml = None

    def read(self) -> DeviceState:
        memory_mib = torch.cuda.max_memory_allocated() / 2**20
        if self._nvml is None:
            return DeviceState(memory_mib)
        nvml, handle = self._nvml, self._handle
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return DeviceState(
            peak_memory_mib=memory_mib,
            sm_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            slowdowns=tuple(name for bit, name in SLOWDOWNS.items() if reasons & bit),
        )
