"""The versions and devices that a result depends on."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import farspan


def versions() -> dict[str, str]:
    """Versions of Farspan, Python, torch and transformers, and of triton where it is installed."""
    found = {"farspan": farspan.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> dict[str, Any]:
    """The CPU: model, cores that this process may use, torch threads, and its instructions for bfloat16."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if capabilities.get(name)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": _cpu_model(), "cores": cores, "threads": torch.get_num_threads(), "bfloat16": names}


def gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs that torch can use: name, memory in bytes, compute capability."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability})
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, UnicodeDecodeError):
        return platform.processor() or platform.machine()
