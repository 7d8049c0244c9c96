"""What gpu_check.py knows of tests: a pytest plugin that writes it, and the groups it makes of it.

The plugin writes what tests report as it happens, a line of JSON each. A report that pytest writes
in the end is lost when it is killed, which is what a kernel that hangs leads to: no signal reaches
Python while it waits for one. And under pytest-xdist an interrupted run's JUnit report has an
empty case, which looks passed, for a test that was running. With it the process that hands out the
tests writes.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--live-report", metavar="FILE", help="write what tests report as it happens")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("live_report")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(LiveReport(path))


class LiveReport:
    def __init__(self, path: str) -> None:
        self.path = path

    def write(self, **line: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(collected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.write(collected=len(ids))  # the same in every worker

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of the set-up, the test itself and what comes after it; or of a worker's crash."""
        reason = ""
        if report.skipped and isinstance(report.longrepr, (tuple, list)):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        self.write(
            test=report.nodeid,
            outcome=report.outcome,
            seconds=report.duration,
            reason=reason,
            backend=str(dict(report.user_properties).get("backend", "-")),
        )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="ended")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Without what comes after the last newline: half a line of what was killed."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@dataclass
class Group:
    """Tests of one function on one backend, whatever their parameters."""

    passed: int = 0
    failed: int = 0
    remarks: Counter[str] = field(default_factory=Counter)  # why skipped, what ran out of time
    seconds: float = 0.0

    def add(self, other: Group) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.remarks += other.remarks
        self.seconds += other.seconds

    def skip(self, reason: str) -> None:
        self.remarks[f"skipped ({reason})"] += 1

    def fail(self, remark: str) -> None:
        self.failed += 1
        self.remarks[remark] += 1

    def line(self, backend: str, name: str) -> list[str]:
        remarks = ", ".join(f"{n} {remark}" for remark, n in self.remarks.items())
        return [backend, name, str(self.passed), str(self.failed), f"{self.seconds:.1f}", remarks]


Groups = dict[tuple[str, str], Group]


def group(lines: Sequence[dict[str, Any]], unfinished: str = "did not end") -> Groups:
    """By backend and function. What has started and not ended has failed, with that remark."""
    tests: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if "test" in line:
            tests[line["test"]].append(line)
    groups: Groups = defaultdict(Group)
    for test, reports in tests.items():
        outcomes = {x["outcome"]: x for x in reports}
        if "ended" in outcomes:
            backend = reports[-2]["backend"]
        else:  # nothing but its name may be known
            known = re.search(r"[\[-](cuda|triton)[]-]", test)
            backend = known[1] if known else "-"
        name = test.partition("[")[0].rpartition("::")[2].removeprefix("test_").replace("_", " ")
        entry = groups[backend, name]
        entry.seconds += sum(x.get("seconds", 0.0) for x in reports)
        if "failed" in outcomes:
            entry.failed += 1
        elif "ended" not in outcomes:
            entry.fail(unfinished)
            print(f"{unfinished}: {test}", flush=True)
        elif "skipped" in outcomes:
            entry.skip(outcomes["skipped"]["reason"] or "no reason given")
        else:
            entry.passed += 1
    return groups
