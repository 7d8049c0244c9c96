"""Work in child processes that may hang, crash or lose their device: what is done stays done.

A child appends lines of JSON to the file that the environment's KD_LINES names: one when it is
ready, and one for each thing it has done (`say`). `watch` yields them as they come, and kills a
child that has been silent for too long: no signal reaches Python while it waits for a kernel.
`work_through` gives a child names to do in turn, and starts another one behind the name at which
one hung, crashed or lost its device. `stoppable` is for the parent: a child is in a session of its
own, which no signal to its parent reaches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LINES = "KD_LINES"
START = 120.0  # seconds until a child is ready: imports, the device's context
POLL = 0.02
STOP = threading.Event()  # set where all of this is to end: children are killed, none is begun

Line = dict[str, Any]


def say(**line: Any) -> None:
    """In a child: a line for its parent, if it has one. One write, so that lines never mix."""
    if path := os.environ.get(LINES):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def kill(process: subprocess.Popen) -> None:
    """It and all that it has started."""
    with suppress(ProcessLookupError, PermissionError):  # none is left; macOS: or none but zombies
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver may take its time
        process.wait(5)


def stoppable(main: Callable[[], int]) -> int:
    """Its exit status; or, after SIGTERM, SIGHUP or SIGINT, 128 + the first one's number.

    They set STOP, so that it ends by itself, having written what it knows, and `watch` kills what
    it has started. A signal that is ignored stays so: that is what nohup asks for. In a child
    nothing changes, since its parent kills it.
    """
    if LINES in os.environ:
        return main()
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        STOP.set()

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    status = main()
    return 128 + came[0] if came else status


def watch(
    command: Sequence[str],
    *,
    limit: float,
    until: float,
    output: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Line]:
    """The child's lines, then how it ended: {"status": of its exit}.

    Or {"hang": seconds}, when it has said nothing for `limit` of them (START before its first
    line), or {"late": True}, when time.monotonic() has come to `until`, or STOP is set; it is
    killed then. What it prints is appended to the file `output` meanwhile.
    """
    if STOP.is_set():
        yield {"late": True}
        return
    with tempfile.TemporaryDirectory() as folder, open(output or os.devnull, "ab") as printed:
        path = Path(folder) / "lines"
        path.touch()
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {}), LINES: str(path)},
            stdin=subprocess.DEVNULL,
            stdout=printed if output else None,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        heard, allowed, half = time.monotonic(), START, ""
        try:
            with path.open(encoding="utf-8") as file:
                while True:
                    status = process.poll()  # before the file is read: that is all, then
                    *lines, half = (half + file.read()).split("\n")
                    if lines:
                        heard, allowed = time.monotonic(), limit
                    yield from map(json.loads, lines)
                    if status is not None:
                        yield {"status": status}
                        return
                    if STOP.is_set() or time.monotonic() > until:
                        yield {"late": True}
                        return
                    if time.monotonic() > heard + allowed:
                        yield {"hang": allowed}
                        return
                    time.sleep(POLL)
        finally:
            kill(process)


def work_through(
    names: Sequence[str], command: Sequence[str], *, until: float, **options: Any
) -> Iterator[Line]:
    """What children say of the names, which they get as arguments and do in this order.

    A line with "name" for each: the child's own, or one with "failed" that tells how the child
    ended in it. One with "lost" says that the child ends because its device is lost. Names that are
    not done when `until` comes, or STOP is set, have none.

    A line with "failed" and no name tells how a child ended where that is no name's fault. Either
    it got not ready: that is the last line. Or its status was not 0, or it was silent for too long,
    after its last name or after one with "lost": then names may be left, which the next child does.
    So it is with the status of compute-sanitizer, which tells of all that its child has done.
    """
    left = list(names)
    while left and not STOP.is_set() and time.monotonic() < until:
        ready = lost = False
        end: Line = {}
        for line in watch([*command, *left], until=until, **options):
            if "name" in line:
                left.remove(line["name"])
                lost = line.get("lost", False)
                yield line
            elif "ready" in line:
                ready = True
            else:
                end = line
        if "late" in end:
            return
        hung = f"hang: silent for {end.get('hang')} s"
        failed = f"ended with status {end['status']}" if "status" in end else hung
        if not ready:
            yield {"failed": f"not ready: {failed}"}
            return
        if left and not lost:
            yield {"name": left.pop(0), "failed": failed}
        elif end.get("status") != 0:
            yield {"failed": failed}
