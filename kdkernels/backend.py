"""Which implementations exist in this installation, and which one a call uses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

# Defines the operators, before any extension registers kernels for them.
from kdkernels import ops  # noqa: F401


class Memory(NamedTuple):
    """Memory of large gradients on the CPU, in bytes: that may be kept for later calls, that is,
    and that gradients hold which somebody still sees.
    """

    limit: int
    kept: int
    lent: int


class Availability(NamedTuple):
    """Whether a backend can be used, why or why not, and what its build recorded."""

    available: bool
    reason: str
    build: Mapping[str, Any] = MappingProxyType({})


_NO_DEVICE = "PyTorch finds no CUDA device"
# Per device type, fastest first; the reference runs everywhere and closes every list.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# In Triton's interpreter, a debugging aid that its tests run in, kernels work on CPU tensors.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if _INTERPRETED else "cuda"}


def _import_error(module: str, absent: str) -> str | None:
    """Imports an optional module of this package; None, or why that failed."""
    if importlib.util.find_spec(module) is None:
        return absent
    try:
        importlib.import_module(module)
    except Exception as error:  # another Triton or torch may fail in any way
        return f"{module} does not load: {error}"
    return None


def _build_record() -> dict[str, Any]:
    """What setup.py wrote about the build; empty where it has not run."""
    try:
        text = Path(__file__).with_name("_build.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return dict(json.loads(text))


def _probe() -> dict[str, Availability]:
    build = _build_record()
    reasons = build.pop("reasons", {})

    def compiled(name: str, module: str) -> Availability:
        missing = reasons.get(name, f"this installation has no {name} kernels")
        error = _import_error(module, f"not built: {missing}")
        how = error or "compiled kernels are loaded"
        return Availability(error is None, how, MappingProxyType(build))

    def cuda() -> Availability:
        module = "kdkernels._cuda"
        if torch.version.cuda is None and importlib.util.find_spec(module):
            # Loaded all the same, it would bring a second CUDA runtime that nobody asked for.
            why = f"{module} is built, but this PyTorch ({torch.__version__}) has no CUDA"
            return Availability(False, why, MappingProxyType(build))
        entry = compiled("cuda", module)
        if entry.available and not torch.cuda.is_available():
            return entry._replace(available=False, reason=_NO_DEVICE)
        return entry

    def triton() -> Availability:
        if not (_INTERPRETED or torch.cuda.is_available()):
            return Availability(False, _NO_DEVICE)  # and importing Triton takes its time
        absent = "not part of this build: there is no kdkernels.triton_kernels"
        error = _import_error("kdkernels.triton_kernels", absent)
        how = "in Triton's interpreter, on CPU tensors" if _INTERPRETED else "Triton is loaded"
        return Availability(error is None, error or how)

    return {
        "cuda": cuda(),
        "triton": triton(),
        "cpu": compiled("cpu", "kdkernels._C"),
        "reference": Availability(True, "plain PyTorch, always there"),
    }


_available = _probe()
_warned: set[str] = set()  # kinds of warnings


def backends() -> dict[str, Availability]:
    """The backends `cuda`, `triton`, `cpu` and `reference`: usable or not, why, and build facts."""
    return dict(_available)


def memory() -> Memory:
    """What the CPU kernels keep of gradients that are gone.

    A gradient of 2 MiB or more comes from memory that earlier ones have given back, because fresh
    memory costs several times the loss at its first touch. At most `limit` bytes are kept,
    KDKERNELS_POOL MiB of the environment, 1024 by default and none with 0; what is more goes to the
    system, the largest first. No memory is used again while a tensor sees it. The storage of these
    gradients cannot be resized. Without CPU kernels, and under torch 2.10, all are 0.
    """
    return Memory(*_extension().memory()) if _available["cpu"].available else Memory(0, 0, 0)


def release_memory() -> None:
    """Gives what `memory` keeps to the system."""
    if _available["cpu"].available:
        _extension().release_memory()


def _extension() -> Any:
    return importlib.import_module("kdkernels._C")


def choose(backend: str | None, device: torch.device) -> str:
    """The backend that a call on `device` uses.

    `None` takes the fastest one available there; when that is not the fastest one there is, the
    first call of the process that meets this warns. A backend asked for by name is used or
    refused.
    """
    if backend is not None:
        return _named(backend, device)
    preferred = _PREFERENCE.get(device.type, ())
    if preferred and serves(preferred[0], device):
        return preferred[0]
    name = next((x for x in preferred[1:] if serves(x, device)), "reference")
    _warn_downgrade(name, device.type)
    return name


def serves(name: str, device: torch.device) -> bool:
    """Whether one of the backends with kernels can be used on a device."""
    return _available[name].available and _DEVICE[name] == device.type


def check_name(argument: str, backend: Any) -> None:
    allowed = ", ".join(_available)
    if backend is not None and not isinstance(backend, str):
        kind = type(backend).__name__
        raise TypeError(f"{argument}: got {kind}; must be None or one of {allowed}")
    if backend is not None and backend not in _available:
        raise ValueError(f"{argument}: got {backend!r}; must be None or one of {allowed}")


def _named(backend: str, device: torch.device) -> str:
    check_name("backend", backend)
    if not _available[backend].available:
        raise RuntimeError(f"backend {backend!r} is not available: {_available[backend].reason}")
    if _DEVICE.get(backend, device.type) != device.type:
        raise ValueError(
            f"backend {backend!r} works on {_DEVICE[backend]} tensors; the logits are on {device}"
        )
    return backend


def _warn_downgrade(name: str, device_type: str) -> None:
    missing = [
        f"{better} ({_available[better].reason})"
        for better in _PREFERENCE.get(device_type, ())
        if not _available[better].available
    ]
    why = "; not available: " + ", ".join(missing) if missing else ""
    warn_once(
        "backend",
        f"kdkernels uses its slower backend {name!r} for {device_type} tensors{why}. "
        "Pass backend= to choose one and silence this.",
    )


def warn_once(kind: str, message: str) -> None:
    """One warning of a kind in a process, at the line that called this package; under torch.compile
    it comes while the graph is traced, at the line that called the compiled function.
    """
    if kind in _warned:
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours_or_torchs(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
    _warned.add(kind)  # not of a warning that was made an error


def _is_ours_or_torchs(module: str) -> bool:
    return module.partition(".")[0] in ("kdkernels", "torch")


# What torch.compiler.assume_constant_result does, which imports torch._dynamo for it: that would
# make this package slow to import. Dynamo then calls the function, and no graph holds it.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def checks_targets(device: torch.device) -> bool:
    """Whether the range of targets is checked before a call, which reads them on the host.

    That costs nothing on a CPU. On other devices it is a synchronisation, done only when
    KDKERNELS_CHECK is set to something else than 0; without it a bad target makes its row NaN.
    """
    return device.type == "cpu" or os.environ.get("KDKERNELS_CHECK", "0") not in ("", "0")
