"""The emulation that runs GPU kernels on the CPU finds what a GPU leaves undefined, and no more."""

from __future__ import annotations

import itertools
import re

import pytest

try:
    from kdkernels import _simt
except ImportError:
    pytest.skip("the emulation is not built: KDKERNELS_SIMT=1", allow_module_level=True)

SEEDS = range(8)

# Planted fault -> what its report has to say. Some show differently, depending on who comes first.
SAYS = {
    "read_before_write": "race",
    "write_after_read": "race",
    "barrier_of_a_warp_for_a_block": "race",
    "two_writers_of_a_shared_element": "race",
    "divergent_barrier": "divergent barrier",
    "exit_before_barrier": "divergent barrier",
    "missing_sync_warp": "race",
    "sync_warp_of_others": "race",
    "mask_without_itself": "outside its own mask",
    "mask_without_the_source": "outside of mask",
    "mask_names_an_absent_lane": "never arrive",
    "masks_differ": "differ",
    "lane_masks_differ": "differ",
    "operations_differ": "differ",
    "circular_masks": "deadlock",
    "absent_at_the_warp_barrier": "divergent barrier",
    "shared_below": r"element -1 .* out of bounds",
    "shared_above": r"element 64 .* out of bounds",
    "shared_too_much": "the launch gives 2560",
    "shared_unwritten": "unwritten",
    "global_load_outside": "loads .* out of bounds: at offset 1024 of 'in'",
    "global_store_outside": "stores .* out of bounds: at offset -4 of 'out'",
    "global_misaligned": "loads 16 bytes at offset 12 of 'in': misaligned",
    "store_to_an_input": "'in': an input is read-only",
    "output_written_twice": "'out' .* written twice",
    "copy_read_before_its_wait": "in flight",
    "copy_of_a_later_group": "in flight",
    "copy_wait_without_commit": "in flight",
    "copy_waited_for_by_another": "race|in flight",
    "copy_wait_after_the_barrier": "race|in flight",
    "slot_refilled_too_early": "race|in flight",
    "store_under_a_copy": "in flight",
    "copy_misaligned": "copies 16 bytes at offset 8 of 'in': misaligned",
    "copy_from_outside": "copies .* out of bounds: at offset 1024 of 'in'",
    "exit_with_a_copy_in_flight": "exits with 1 asynchronous copies in flight",
    "load_of_what_the_launch_writes": "'partial' .* written in the same launch",
    "partial_without_the_last_block": "'partial' .* race",
    "partial_without_the_barrier": "'partial' .* race",
    "partial_by_the_constant_path": "'partial' .* written in the same launch",
    "counted_twice": "called twice",
    "not_counted": "left its counter at 3",
}


def test_every_planted_fault_is_expected() -> None:
    assert sorted(_simt.faults()) == sorted(SAYS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SAYS)
def test_a_fault_is_found_under_every_seed(name: str, seed: int) -> None:
    said = _simt.run_fault(name, seed)
    assert re.search(SAYS[name], said), said


@pytest.mark.parametrize("name", SAYS)
def test_the_correct_twin_passes(name: str) -> None:
    for seed in SEEDS:
        assert _simt.run_fault(f"{name}/ok", seed) == ""


def test_a_fault_names_the_block_and_the_thread() -> None:
    said = _simt.run_fault("shared_above", 0)
    assert re.match(r"block [0-3] thread 63: stores element 64 of an array of 64", said), said


def test_a_fault_leaves_the_emulation_usable() -> None:
    expected = _simt.run_fault("results", 0)
    for name in SAYS:
        assert _simt.run_fault(name, 0)
        assert _simt.run_fault("results", 0) == expected


def test_seeds_change_the_schedule() -> None:
    schedules = [_simt.run_fault("schedule", seed) for seed in SEEDS]
    assert schedules == [_simt.run_fault("schedule", seed) for seed in SEEDS]
    assert len(set(schedules)) >= 4
    everyone = sorted([*range(4 * 64), *range(4 * 64)])
    for schedule in schedules:
        assert sorted(map(int, schedule.split())) == everyone


def test_results_do_not_depend_on_the_seed() -> None:
    results = {_simt.run_fault("results", seed) for seed in range(32)}
    assert len(results) == 1
    sums = [float.fromhex(x) for x in results.pop().split()]
    expected = [0.0] * 4
    for thread, step in itertools.product(range(64), range(6)):
        slot = (thread + 5) % 64  # filled by the thread of that number
        granule = (slot + (step * 7 if step < 2 else step - 2)) % 64
        values = sum(2 ** -(0.37 * (i % 19)) for i in range(4 * granule, 4 * granule + 4))
        expected = [e + values * (1 + b + (thread + step) % 5) for b, e in enumerate(expected)]
    assert sums == pytest.approx(expected, rel=1e-5)


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="no planted fault is called 'nothing'"):
        _simt.run_fault("nothing", 0)
