"""One record for each case and provider: time, traffic, memory, errors, or why there are none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from bench import providers
from bench.cases import Case, truth
from bench.measure import (
    Call,
    CopyCall,
    Inputs,
    LossCall,
    Machine,
    Timing,
    gradient_errors,
    sets_beyond_cache,
    time_interleaved,
)

COPY = "copy"
Record = dict[str, Any]
WARM = 0.02  # seconds that every call runs before it is timed


def facts_of(case: Case) -> Record:
    return {
        "loss": case.loss,
        "pass": case.direction,
        "rows": case.rows,
        "classes": case.classes,
        "layout": case.layout,
        "dtype": case.dtype,
        "ignored": case.ignored,
    }


def case_of(record: Record) -> Case:
    return Case(
        record["loss"],
        int(record["rows"]),
        int(record["classes"]),
        record["dtype"],
        record["layout"],
        record["pass"],
        int(record.get("ignored", 0)),  # results of before have none
    )


def pool_copies(records: Sequence[Record]) -> None:
    """Sets "share_of_copy" of all records: of one bandwidth for each amount of bytes.

    A copy takes turns with the losses in every case, so that it meets the same machine. One case's
    copy may still be lucky or not, and rows of the same shape would differ by that. What counts is
    the median of all copies of as many bytes in a run, by the same operator.
    """
    rates: dict[tuple[bool, int], list[float]] = {}

    def of(record: Record) -> tuple[bool, int]:
        case = case_of(record)
        return case.passes == 3, case.logit_bytes

    for record in records:
        if record["provider"] == COPY:
            rates.setdefault(of(record), []).append(record["gb_per_s"])
    for record in records:
        if "gb_per_s" in record:
            record["share_of_copy"] = record["gb_per_s"] / median(rates[of(record)])


def without_result(case: Case, name: str, reason: str) -> Record:
    return {**facts_of(case), "provider": name, "missing": reason}


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


class Runner:
    """Measures cases one after another on a machine; inputs are kept while they stay the same."""

    def __init__(
        self,
        machine: Machine,
        names: Sequence[str],
        *,
        seconds: float,
        sets: int | None = None,
        seed: int = 0,
        show: Callable[[str], object] = lambda text: None,
    ) -> None:
        """names: the providers that are asked for; seconds: of timing, for each case."""
        self.machine, self.names, self.seconds, self.sets = machine, names, seconds, sets
        self.seed, self.show = seed, show
        self._inputs: Inputs | None = None
        self._drawn_for: Any = None
        self._lost: str | None = None  # why nothing more can be measured in this process

    def measure(self, case: Case) -> list[Record]:
        """The copy's record, and one for each provider that could be expected here."""
        asked = [x for x in providers.of(case, self.machine.type) if x in self.names]
        if self._lost:
            return [without_result(case, name, self._lost) for name in asked]
        try:
            return self._measure(case, asked)
        except Exception as error:  # out of memory with the inputs, the truth or all calls together
            reason = self._after(error, str(case))
            return [without_result(case, name, reason) for name in asked]

    def _after(self, error: Exception, what: str) -> str:
        """Ready for the next call, if it can be; the reason that is reported."""
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        try:
            self.machine.synchronize()
        except Exception:  # an illegal access stays with the process
            self._lost = f"not begun: the device was lost in {what}, {reason}"
        return reason

    def _measure(self, case: Case, asked: Sequence[str]) -> list[Record]:
        sets = self.sets or sets_beyond_cache(case, self.machine.cache)
        if self._drawn_for != case.inputs:
            self._inputs = self._drawn_for = None
        self.machine.release()
        free = int(0.9 * self.machine.free_memory)
        if self._inputs is not None:
            free += 2 * sets * case.tensor_bytes
        if (needed := case.memory(sets, fused=True)) > free:
            reason = f"needs about {_gib(needed)} of memory, {_gib(free)} are free"
            return [without_result(case, name, reason) for name in asked]
        if self._inputs is None:
            self._inputs = Inputs.draw(case, sets, self.seed, self.machine.type)
            self._drawn_for = case.inputs

        inputs = self._inputs
        torch.compiler.reset()  # or it gives up after some shapes
        calls: dict[str, Call] = {COPY: CopyCall(case, inputs)}
        found: dict[str, Record] = {COPY: {}}
        failed: dict[str, str] = {}
        true_result = None
        for name in asked:
            self.show(f"{case}, {name}")
            reason = self._lost or providers.missing(name, case, self.machine.type)
            # A GPU says when its memory is not enough; a CPU's system ends the process.
            needed = case.memory(sets, fused=name in providers.FUSED)
            if reason is None and self.machine.type == "cpu" and needed > free:
                reason = f"may need {_gib(needed)} of memory, {_gib(free)} are free"
            if reason is None:
                if true_result is None:
                    true_result = truth(
                        case.loss,
                        inputs.students[0].detach(),
                        inputs.teachers[0],
                        inputs.targets[0],
                    )
                try:
                    call = LossCall(providers.build(name, case), inputs, case.direction)
                    found[name] = self._check(call, true_result)
                    calls[name] = call
                except Exception as error:  # torch.compile without a compiler, out of memory
                    reason = self._after(error, f"{case}, {name}")
                if reason is not None and not self._lost:
                    self.machine.release()
            if reason is not None:
                failed[name] = reason
        records = []
        if self._lost:
            failed |= {x: self._lost for x in asked if x not in failed}
        elif len(calls) > 1:
            self.show(f"{case}, timing")
            timings = self._time(calls, found, sets)
            records = [self._record(case, name, timings, calls, found[name]) for name in calls]
            pool_copies(records)
        return [*records, *(without_result(case, *item) for item in failed.items())]

    def _check(self, call: LossCall, true_result: Any) -> Record:
        """Errors and memory; the first call also compiles what is compiled."""
        out: Record = gradient_errors(call.run(call.prepare(0)), true_result)
        state = call.prepare(0)
        out["peak_bytes"] = self.machine.peak_memory(lambda: call.run(state))
        return out

    def _time(
        self, calls: dict[str, Call], found: dict[str, Record], sets: int
    ) -> dict[str, Timing]:
        for call in calls.values():
            began = time.perf_counter()
            while time.perf_counter() - began < WARM:
                call.run(call.prepare(0))
                self.machine.synchronize()
        clock, more = self.machine.clock(calls)
        for name, entry in more.items():
            found[name] |= entry
        return time_interleaved(calls, clock=clock, sets=sets, seconds=self.seconds)

    def _record(
        self,
        case: Case,
        name: str,
        timings: dict[str, Timing],
        calls: dict[str, Call],
        found: Record,
    ) -> Record:
        copy = calls[COPY]
        assert isinstance(copy, CopyCall)
        seconds = timings[name].median
        moved = copy.bytes if name == COPY else case.bytes
        record = {
            **facts_of(case),
            "provider": name,
            "input_sets": len(copy.stores),
            **timings[name].summary(),
            "bytes": moved,
            "gb_per_s": moved / seconds / 1e9,
            "share_of_copy": None,  # by pool_copies
        }
        if name != COPY:
            record["exponentials"] = case.exponentials
            record["exponentials_per_s"] = case.exponentials / seconds
        if name in providers.FUSED:
            record["regime"] = providers.regime(name, case, self.machine)
        return record | found


def run(
    runner: Runner, cases: Sequence[Case], budget: float | None = None
) -> Iterator[list[Record]]:
    """The records of each case; after `budget` seconds no further case is begun.

    Shares of the copy are those of the case alone: pool_copies sets those of a run.
    """
    began = time.perf_counter()
    for case in cases:
        if budget is not None and time.perf_counter() - began > budget:
            names = [x for x in providers.of(case, runner.machine.type) if x in runner.names]
            reason = f"not begun: the budget of {budget:g} s was spent"
            yield [without_result(case, name, reason) for name in names]
        else:
            yield runner.measure(case)
