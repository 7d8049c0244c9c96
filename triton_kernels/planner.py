"""Which kernel takes a call, and with how large a tile: a function of its shape and a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton


@dataclass(frozen=True)
class Device:
    """What the planner asks of a device."""

    multiprocessors: int
    ctas: int = 1  # of the largest cluster; 1: none


@dataclass(frozen=True)
class Plan:
    """How a call is run; see kernels.py for the regimes."""

    regime: str  # "resident", "sweeps", "split" or, for the backward pass, "gradient"
    block: int  # tile indices of one row that a program holds at a time
    rows: int  # rows of a tile
    warps: int
    programs: int  # per slice
    parts: int = 1  # slices of a row
    part_chunks: int = 1  # blocks of a slice
    stages: int = 1  # chunks under way at a time, all but one in shared memory
    ctas: int = 1  # of a program: a cluster, each of which holds its share of the block


# (block, rows, warps): the first block that holds a row. A tile has 8 logits of each tensor per
# thread where it can. Registers bound the largest: 32 exponentials of each tensor per thread.
RESIDENT = (
    (16, 64, 4),
    (32, 32, 4),
    (64, 16, 4),
    (128, 8, 4),
    (256, 4, 4),
    (512, 2, 4),
    (1024, 1, 4),
    (2048, 1, 4),
    (4096, 1, 8),
    (8192, 1, 16),
    (16384, 1, 16),
)
# The largest of RESIDENT: with 16-bit logits at one temperature, of which nothing but exponentials
# is kept; otherwise; of losses whose second round needs twice the registers; in float64.
LARGEST, LARGEST_ELSE, LARGEST_HEAVY, LARGEST_WIDE = 16384, 8192, 4096, 2048
# (tile indices, warps) of a CTA in a cluster, for the same calls and otherwise:
# two to a multiprocessor, where one waits while the other computes, and one that fills it.
CLUSTER, CLUSTER_ELSE = ((8192, 8), (16384, 16)), ((4096, 8), (8192, 16))
# (block, warps) of rows that are walked in chunks. A whole row: fills a multiprocessor. A slice of
# a row: several programs share one.
CHUNK, CHUNK_WIDE = (8192, 16), (1024, 8)
# Chunks of a whole row that are under way: 64 KiB of shared memory for the two tensors, for the
# same calls and otherwise; in float64 nothing waits for memory.
STAGES, STAGES_ELSE, STAGES_WIDE = 3, 2, 1
SLICE, SLICE_WIDE = (4096, 8), (1024, 8)
MOST_PARTS = 64  # of a split row: their statistics are merged by every program


def plan(
    rows: int, window: int, device: Device, *, small: bool, wide: bool, heavy: bool = False
) -> Plan:
    """The plan for rows of `window` tile indices. A pure function.

    small: 16-bit logits at one temperature, of which nothing but exponentials is kept; wide:
    computed in float64; heavy: in more registers than two CTAs, or 16 warps, have per thread.
    """
    largest = LARGEST_HEAVY if heavy else LARGEST if small else LARGEST_ELSE
    if window <= (LARGEST_WIDE if wide else largest):
        block, tile, warps = next(x for x in RESIDENT if x[0] >= window)
        if wide and block == LARGEST_WIDE:
            warps *= 2  # as many registers per thread as below; the logarithms of JSD need them
        return Plan("resident", block, tile, warps, triton.cdiv(rows, tile))
    if device.ctas > 1 and not wide and not heavy:
        # For few rows, too: one launch, which reads them once, where slices take two.
        block = triton.next_power_of_2(window)
        for own, warps in CLUSTER if small else CLUSTER_ELSE:
            if block <= own * device.ctas:
                return Plan("resident", block, 1, warps, rows, ctas=block // own)
    if rows >= device.multiprocessors:
        # One row in flight per multiprocessor, which the reversed sweep finds in the L2 cache as
        # far as they fit; fewer would leave bandwidth unused.
        block, warps = CHUNK_WIDE if wide else SLICE if heavy else CHUNK
        stages = STAGES_WIDE if wide else STAGES if small else STAGES_ELSE
        return Plan("sweeps", block, 1, warps, device.multiprocessors, stages=stages)
    block, warps = SLICE_WIDE if wide else SLICE
    chunks = triton.cdiv(window, block)
    parts = min(chunks, MOST_PARTS, triton.cdiv(4 * device.multiprocessors, max(rows, 1)))
    part_chunks = triton.cdiv(chunks, parts)
    return Plan("split", block, 1, warps, rows, triton.cdiv(chunks, part_chunks), part_chunks)


def backward_plan(rows: int, window: int, *, wide: bool) -> Plan:
    """The plan of the gradient from known statistics: every slice of every row at once."""
    largest, _ = SLICE_WIDE if wide else SLICE
    block, tile, warps = next(x for x in RESIDENT if x[0] >= min(window, largest))
    return Plan("gradient", block, tile, warps, triton.cdiv(rows, tile), triton.cdiv(window, block))


def largest_cluster(
    major: int,
    multiprocessors: int,
    version: str = triton.__version__,
    amd: bool = torch.version.hip is not None,
) -> int:
    """CTAs of the largest cluster, by compute capability and version of Triton; 1: none."""
    # Older Tritons do not compile a reduction across CTAs; from sm_110 on it is not supported.
    too_old = tuple(int(x) for x in version.split(".")[:2]) < (3, 9)
    if amd or too_old or major not in (9, 10):
        return 1
    # Every device runs 8. 16 need a GPC of so many multiprocessors, and there are 8 GPCs at most.
    return 16 if multiprocessors >= 8 * 16 else 8


@lru_cache
def device_of(device: torch.device) -> Device:
    if device.type == "cpu":  # interpreted
        return Device(multiprocessors=4)
    found = torch.cuda.get_device_properties(device)
    count = found.multi_processor_count
    return Device(count, largest_cluster(found.major, count))
