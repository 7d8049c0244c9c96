"""Compiles the Triton kernels ahead of time, without a device, and describes what comes out.

    python compile_triton.py < jobs.json > facts.json

Jobs are pairs of a target and a call of an operator, whose launches are compiled instead of run.
Each launch gives facts: sizes, Triton's cache key, and unless the call has "compile": false, what
PTX and SASS are made of. A call that fails gives its error instead.
It is a process of its own because kernels that are imported under TRITON_INTERPRET never compile.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kdkernels.triton_kernels import launch, planner

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
PATH = os.pathsep.join([str(TOOLS), os.environ.get("PATH", "")])
COMPILE = triton.runtime.JITFunction._do_compile


# ---- a device that is not there -------------------------------------------------------------


def pretend(name: str, ctas: int) -> None:
    """Makes Triton compile for a target, and the planner plan for 132 multiprocessors."""
    backend, architecture = name.split(":")
    if backend == "cuda":
        target = GPUTarget(backend, int(architecture), 32)
    else:
        target = GPUTarget(backend, architecture, 64)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    launch.device_of = lambda device: planner.Device(multiprocessors=132, ctas=ctas)


# ---- calls ----------------------------------------------------------------------------------


def logits(rows: int, classes: int, layout: str, dtype: str) -> Tensor:
    """Never touched, so its pages are never mapped."""
    kind = getattr(torch, dtype)
    if layout == "contiguous":
        return torch.empty((rows, classes), dtype=kind)
    if layout == "next_token":
        return torch.empty((2, rows // 2 + 1, classes), dtype=kind)[:, :-1]
    if layout == "odd_offset":
        return torch.empty((rows, classes + 4), dtype=kind)[:, 1:-3]
    raise ValueError(layout)


def call(job: dict[str, Any]) -> None:
    size = job["rows"], job["classes"]
    student = logits(*size, job["layout"], job["student"])
    teacher = None
    if job["teacher"] is not None:
        teacher = logits(*size, job["teacher_layout"], job["teacher"])
    shape = student.shape[:-1]
    target = torch.zeros(shape, dtype=torch.int64)
    dtype = launch.ops.loss_dtype(student, teacher)
    weight = torch.ones(shape, dtype=dtype) if job["weight"] else None
    inputs = (job["loss"], student, teacher, target, weight)
    params = torch.tensor(job["params"], dtype=torch.float64)
    if job["of_rows"]:
        params = params.repeat(shape.numel(), 1)
    last = (params, job["ignore_index"])
    if job["op"] == "forward":
        launch.forward(*inputs, *last)
    elif job["op"] == "backward":
        outputs = launch.ops.LOSSES[job["loss"]].outputs
        upstream = torch.empty((outputs, *shape) if outputs > 1 else shape, dtype=dtype)
        stats = torch.empty((shape.numel(), launch.ops.STATS_WIDTH), dtype=dtype)
        launch.backward(job["loss"], upstream, *inputs[1:], stats, *last)
    elif job["op"] == "reduced":
        # In the dtype of the loss it stands for one on the device.
        number = None if job["scale"] == 1 else torch.tensor(1 / job["scale"], dtype=torch.float64)
        normalizer = torch.ones((), dtype=dtype) if job["normalizer"] else number
        launch.reduced(*inputs, normalizer, True, *last, True)
    else:
        launch.scale_(student, torch.ones((), dtype=dtype))


# ---- facts ----------------------------------------------------------------------------------


def tool(*arguments: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        # cuobjdump looks for nvdisasm on the PATH.
        command = [shutil.which("cuobjdump", path=PATH), *arguments, str(path)]
        env = os.environ | {"PATH": PATH}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def accesses(ptx: str, kind: str) -> dict[str, int]:
    """How many loads or stores of global memory there are, by bytes per access: 16, or fewer."""
    found = {"vector": 0, "scalar": 0}
    for name in re.findall(rf"\b{kind}\.global[\w.:]*", ptx):
        count, bits = re.search(r"(?:\.v(\d+))?\.[bfsu](\d+)$", name).groups()
        found["vector" if int(count or 1) * int(bits) >= 128 else "scalar"] += 1
    if kind == "ld":  # those to shared memory, ahead of their use
        for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)", ptx):
            found["vector" if int(size, 0) >= 16 else "scalar"] += 1
    return found


@dataclass(frozen=True)
class Binary:
    """A compiled kernel, known by its hash: many calls share one."""

    hash: str
    asm: Mapping[str, Any] = field(compare=False)


@functools.cache
def describe(binary: Binary, sass: bool) -> dict[str, Any]:
    if "ptx" not in binary.asm:
        return {"bytes": len(binary.asm["hsaco"])}
    ptx, cubin = binary.asm["ptx"], binary.asm["cubin"]
    facts: dict[str, Any] = {"loads": accesses(ptx, "ld"), "stores": accesses(ptx, "st")}
    facts["cluster"] = [int(x) for x in re.findall(r"\.reqnctapercluster (\d+)", ptx)]
    facts["barriers"] = len(re.findall(r"\bbarrier\.cluster\.wait\b", ptx))
    facts["remote"] = len(re.findall(r"\bld\.shared::cluster\b", ptx))
    if shutil.which("cuobjdump", path=PATH):
        usage = tool("--dump-resource-usage", cubin=cubin)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        facts |= {"registers": int(registers), "stack": int(stack)}
        if sass:
            facts["ex2"] = len(re.findall(r"\bMUFU\.EX2\b", tool("-sass", cubin=cubin)))
    return facts


def launches(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts about every kernel that a call launches."""
    seen: list[dict[str, Any]] = []
    keys: list[str] = []

    # Not by Triton's own hooks: 3.6 cannot tell them about arguments that are functions.
    def compile_only(self: Any, key: Any, *rest: Any, **more: Any) -> Any:
        keys.append(str(key))
        return COMPILE(self, key, *rest, **more) if job["compile"] else None

    def compiled(
        kernel: Any, grid: tuple[int, ...], warps: int, arguments: dict[str, Any], ctas: int = 1
    ) -> None:
        arguments = {**arguments, **dict(job["plant"])}
        warps = arguments.pop("warps", warps)
        own = {name: arguments[name] for name in kernel.arg_names}
        # Triton knows what it has compiled by the device, which is the same for every target here.
        kernel.device_caches.clear()
        target = triton.runtime.driver.active.get_current_target()
        chosen = launch.options(warps, ctas, amd=target.backend == "hip")
        out = kernel.warmup(**own, grid=grid, **chosen)
        facts = {"kernel": kernel.fn.__name__, "key": keys[-1], "warps": warps, "ctas": ctas}
        facts |= {x.lower(): own.get(x) for x in ("BLOCK", "ROWS", "ALIGNED", "STAGES")}
        facts["rows"], facts["stages"] = facts["rows"] or 1, facts["stages"] or 1
        if out is not None:
            facts |= describe(Binary(out.hash, out.asm), job["sass"])
        seen.append(facts)

    launch.launch = compiled
    triton.runtime.JITFunction._do_compile = compile_only
    call(job)
    return seen


def main() -> None:
    results = []
    for target, job in json.load(sys.stdin):
        try:
            pretend(target, job["ctas"])
            results.append(launches(job))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
