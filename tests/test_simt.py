"""The emulation that runs GPU kernels on the CPU finds what a GPU leaves undefined, and no more."""

from __future__ import annotations

import itertools
import re

import pytest

try:
    from kdkernels import _simt
except ImportError:
    pytest.skip("the emulation is not built: KDKERNELS_SIMT=1", allow_module_level=True)

pytestmark = pytest.mark.full  # the emulation is built for make test-full
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
    "bulk_read_before_its_wait": "in flight|race",
    "bulk_wait_of_the_wrong_parity": "in flight|race|phase error",
    "bulk_waited_for_by_another": "in flight|race",
    "bulk_refill_before_release": "in flight|race|phase error",
    "store_under_a_bulk_copy": "in flight|race",
    "store_before_a_bulk_copy": "without a proxy fence, by thread 1",
    "bulk_to_misaligned": "byte 8 of shared memory: misaligned",
    "bulk_from_misaligned": "copies 64 bytes at offset 8 of 'in': misaligned",
    "bulk_of_an_odd_size": "24 bytes, not a multiple of 16",
    "bulk_of_nothing": "0 bytes, not a multiple of 16",
    "bulk_from_outside": "copies 48 bytes .* out of bounds: at offset 992 of 'in'",
    "bulk_to_outside": r"element 32 .* out of bounds",
    "bulk_from_an_output": "'out', which the launch writes",
    "bulk_from_what_the_launch_wrote": "'partial' .* written in the same launch",
    "bulk_expects_too_much": "deadlock: .* the mbarrier at byte 512 for its phase 0, "
    "which misses 0 of 1 arrivals and 16 of 80 bytes",
    "bulk_expects_too_little": "more bytes came than were expected, 64 and 48",
    "arrives_beyond_the_count": "beyond its count of 1|which is complete",
    "next_phase_before_its_wait": "beyond its count of 1|which is complete",
    "bar_outside": "mbarrier 2 of 2 at byte 512: out of bounds",
    "bar_before_its_init": "the mbarrier at byte 8 of block . before bar_init",
    "bar_init_without_a_fence": "without bar_init_fence",
    "bulk_without_the_init_fence": "(bulk_load|waits).* without bar_init_fence",
    "bar_init_without_a_barrier": "before bar_init|race with its bar_init by thread 32",
    "bar_init_twice": "initializes the mbarrier at byte 520 twice",
    "store_to_an_mbarrier": "part of an mbarrier",
    "exit_with_a_bulk_copy_in_flight": "exits, the last of its block, .* in flight",
    "message_not_waited_for": "in flight|race|unwritten",
    "message_ordered_by_a_barrier": "in flight|race",
    "message_waited_for_by_the_block": "this takes bar_wait_cluster",
    "message_into_a_slot_in_use": "in flight|race",
    "message_back_before_all_have_read": "in flight|race|phase error",
    "order_through_a_peer": "race",
    "message_before_the_phase": "more bytes came|which is complete|in flight",
    "messages_of_two_to_one_slot": "in flight",
    "message_outside": r"st_async: sends to element 32 .* out of bounds",
    "phase_missed": "phase error|in flight|race",
    "message_out_of_the_cluster": "rank 2, outside of the cluster, which has 2 blocks",
    "message_to_an_exited_block": "which has exited|exits, the last of its block, .* in flight",
    "exit_with_a_message_in_flight": "exits, the last of its block, .* in flight",
    "bar_of_a_peer_without_a_barrier": "before bar_init|without bar_init_fence|race",
    "exit_before_the_cluster_barrier": "divergent barrier",
    "cluster_barrier_of_one_block": "divergent barrier: .* sync_cluster",
    "cluster_barrier_of_some_threads": "divergent barrier: .* sync_cluster",
    "absent_at_the_cluster_barrier": "deadlock: .* 64 threads wait at sync_cluster",
    "partial_of_a_peer": "'partial' .* race",
    "launch_of_half_a_cluster": "4 blocks in clusters of 3",
    "launch_of_a_large_cluster": "32 blocks in clusters of 32",
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


def test_results_of_clusters_do_not_depend_on_the_seed() -> None:
    results = {_simt.run_fault("cluster_results", seed) for seed in range(32)}
    assert len(results) == 1
    expected = []
    for cluster, row in itertools.product(range(2), range(4)):
        sums = [sum(0.37 * (i % 19) for i in range(k, k + 32)) for k in (64 * row, 64 * row + 32)]
        expected.append((sums[0] / 2 + sums[1]) * (1 + cluster))
    assert [float.fromhex(x) for x in results.pop().split()] == pytest.approx(expected, rel=1e-5)


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="no planted fault is called 'nothing'"):
        _simt.run_fault("nothing", 0)
