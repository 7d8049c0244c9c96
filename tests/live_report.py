"""A pytest plugin for gpu_check.py: what tests report, as it happens, and an end to what is stuck.

The process that hands out the tests says a line for each that begins and one for each that has
ended (bench/children.py). A report that pytest writes in the end is lost when it is killed. In the
workers of pytest-xdist a test that takes too long, and one that has lost the device, take their
process along: no signal reaches Python while it waits for a kernel, and after an illegal access
everything in the process would fail. xdist calls that a crash, and starts another worker.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Generator, Sequence

import pytest
import torch

from bench.children import say  # gpu_check.py's children find it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--test-limit", type=float, default=120.0, metavar="SECONDS")


def pytest_configure(config: pytest.Config) -> None:
    limit = config.getoption("test_limit")
    worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Guard(limit) if worker else Reporter(limit))


class Guard:
    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.lost = False
        self.stderr = os.dup(2)  # which a test that runs does not have

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self.lost:
                os._exit(1)  # before xdist takes the test for done: it is the one that crashed

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """What the test has begun ends with it: an error of the device is its own.

        Also where a fixture raises at its end; its error is the first of the two that are shown.
        """
        try:
            return (yield)
        finally:
            if torch.cuda.is_initialized():
                try:
                    torch.cuda.synchronize()
                except Exception:
                    self.lost = True
                    raise


class Reporter:
    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.began: dict[str, float] = {}
        self.reports: dict[str, list[pytest.TestReport]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        say(collected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        say(collected=len(ids))  # the same in every worker

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began[nodeid], self.reports[nodeid] = time.monotonic(), []
        say(begun=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of the set-up, the test itself and what comes after it; or of a worker's crash."""
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.when not in ("setup", "call", "teardown"):
            report.duration = time.monotonic() - self.began.get(report.nodeid, time.monotonic())
            self.end(report.nodeid, f"its process crashed, or {self.limit:g} s were over")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.reports[nodeid]:
            self.end(nodeid)

    def end(self, nodeid: str, failed: str = "") -> None:
        """A test that ended and then crashed its process has two lines, the second says failed."""
        reports = self.reports[nodeid]
        self.reports[nodeid] = []
        bad = [x for x in reports if x.failed]
        backend = next((y for x in reports for n, y in x.user_properties if n == "backend"), "")
        line = {"name": nodeid, "backend": backend, "seconds": sum(x.duration for x in reports)}
        skipped = [x.longrepr for x in reports if x.skipped]
        if bad:
            text = "\n".join(x.longreprtext for x in bad)
            said = [x[4:] for x in text.splitlines() if x.startswith("E   ")]
            line |= {"failed": failed or next(iter(said), text[-200:]).strip(), "text": text}
        elif skipped:
            reason = skipped[0][2] if isinstance(skipped[0], (tuple, list)) else str(skipped[0])
            line["skipped"] = reason.removeprefix("Skipped: ")
        say(**line)
