"""What the machine can do: device, native number type, peak FLOP/s, peak memory."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import time

import torch

PEAKS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bfloat16 peak by whole words of a card's name, FLOP/s, from the vendors' data sheets; the first that fits."""


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda where there is one, else the CPU; a device that is not there raises ValueError."""
    usable = ["cpu"]
    usable += ["cuda"] if torch.cuda.is_available() else []
    usable += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        name = "cuda" if "cuda" in usable else "cpu"
    if name not in usable:
        raise ValueError(f"device {name!r} is not available here; use {', '.join(usable)}")
    return torch.device(name)


def torch_device(device: str | torch.device) -> torch.device:
    """What torch knows by this name, such as `cuda:1` or `meta`. ValueError: there is none of it here."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError):  # the first where torch was built without
        raise ValueError(f"device {str(device)!r} is not available here; use cpu, or cuda where there is one") from None


def widest(device: torch.device) -> torch.dtype:
    """The widest float type that the device computes in: float64, but for Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the device multiplies it natively, else float32 (emulated bfloat16 is far slower)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "mps":
        return "float32"
    abilities = torch.cpu.get_capabilities()
    return (
        "bfloat16" if abilities.get("avx512_bf16") or abilities.get("amx_bf16") or abilities.get("bf16") else "float32"
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of matrix products, and where the figure comes from: a data sheet, or a measurement made now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        sheet = data_sheet(torch.cuda.get_device_name(device))
        if sheet is not None:
            return PEAKS[sheet], f"{sheet} data sheet, dense bfloat16"
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = min(_timed_product(a) for _ in range(5))
    return 2 * size**3 / best, f"best of 5 products of {size} x {size} matrices"


def data_sheet(card: str) -> str | None:
    """Which of `PEAKS` a card is; None for one that is none of them, as a laptop's of the same name."""
    words = (rf"(?<!\w){re.escape(part)}(?!\w)(?! D\b| Laptop)" for part in PEAKS)
    return next((part for part, pattern in zip(PEAKS, words, strict=True) if re.search(pattern, card)), None)


def _timed_product(a: torch.Tensor) -> float:
    synchronise(a.device)
    start = time.perf_counter()
    torch.mm(a, a)
    synchronise(a.device)
    return time.perf_counter() - start


def accelerator() -> str:
    """Name of the first CUDA card; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def synchronise(device: torch.device) -> None:
    """Wait for the device's queued work, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: allocated tensors on cuda, resident memory on the CPU.

    On mps, which keeps no maximum, what the driver holds now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Have the C library keep what tensors free for the next ones, in this process; whether it could be asked (glibc).

    Tensors over 32 MB are otherwise mapped anew each time, and every page of them cleared by the kernel: a tenth to a
    fifth of a CPU training step of such sizes (docs/log.md). Costs a few per cent of peak memory.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_max, never, none = -1, -4, -1, 0  # mallopt(3)
    return bool(libc.mallopt(mmap_max, none) and libc.mallopt(trim_threshold, never))
