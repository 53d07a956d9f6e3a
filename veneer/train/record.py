"""Facts for the run record: versions, the machine, and the peak of anonymous memory."""

from __future__ import annotations

import os
import platform
import sys
import threading
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("veneer", "torch", "transformers", "accelerate", "safetensors", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    """Version of Python and of each package that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory in bytes and the device of the run."""
    facts: dict[str, Any] = {
        "device": str(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.machine()


def anonymous_memory() -> int:
    """Bytes of memory that this process alone has written (RssAnon); where the system does not tell, its resident peak.

    Mapped weight files that were only read are not counted: the system can drop those pages.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MemoryMeter:
    """The peak of anonymous memory between ``start`` and ``stop``, sampled by a thread; on CUDA the allocator's peak.

    A step's peak lies between forward and backward, where no Python of the loop runs; hence a thread.
    """

    def __init__(self, device: torch.device, every: float = 0.05) -> None:
        self.device, self.every, self.peak = device, every, 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> MemoryMeter:
        """Begin to sample."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            self.peak = max(self.peak, anonymous_memory())

    def read(self) -> int:
        """The peak so far, bytes."""
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else anonymous_memory()
        self.peak = max(self.peak, now)
        return self.peak

    def stop(self) -> int:
        """End sampling and give the peak."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        return self.read()
