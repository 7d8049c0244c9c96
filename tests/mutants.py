"""Plants the faults of mutants_list.py one at a time and shows whether the tests catch each.

A fault is applied to a copy of a checkout in a temporary folder; what its layer needs is built
there, and the test files that could see it run, up to the first failure: first the test that caught
it last time, if one is known. It survived if all of them passed. A test that fails without the
fault as well proves nothing: the fault is then "unclear". Results are appended to a file as they
come, and the same run goes on where it was stopped. There is no time limit: a fault that could make
a kernel loop for ever has no place in the list.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mutants_list import FIRST, LAYERS, MUTANTS, Mutant, broken

ROOT = Path(__file__).resolve().parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - (.*))?$", re.MULTILINE)
# Runs pytest in a fork of a process that has loaded what takes long, for each line of arguments.
SERVER = """
import json, os, sys
import hypothesis, numpy, pytest, torch, torch._dynamo
for line in sys.stdin:
    output, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        for stream, name in enumerate((os.devnull, output, output)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
        os._exit(pytest.main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
CRASHED = re.compile(r'File ".*?/(tests/test_\w+\.py)", line \d+ in (test_\w+)')


def files_of(tree: Path) -> list[str]:
    command = ["git", "-C", str(tree), "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (tree / name).is_file()]


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Copy:
    """A copy of a checkout, with what was built there."""

    def __init__(self, tree: Path, folder: Path, isas: str) -> None:
        self.folder = folder
        for name in files_of(tree):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, folder / name)
        self.take_over(tree, "build")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("KDKERNELS_")}
        self.environment = clean | {
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a file may change twice within a second
            "COLUMNS": "300",  # or pytest cuts its messages
            "TRITON_INTERPRET": "1",
            "KDKERNELS_BUILD": "cpu",
            "KDKERNELS_CPU_ISAS": isas,
        }
        self.output = folder / "pytest.txt"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", SERVER]
        self.server = subprocess.Popen(command, cwd=folder, env=self.environment, **pipes)

    def take_over(self, other: Path, *names: str) -> None:
        """Folders, times included: ninja then builds no more than it must."""
        for name in (name for name in names if (other / name).is_dir()):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(other / name, self.folder / name, symlinks=True)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env={**self.environment, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip

    def build(self, emulation: bool) -> str | None:
        """What the compiler says, if it fails."""
        simt = str(int(emulation))
        done = self.run("setup.py", "-q", "build_ext", "--inplace", KDKERNELS_SIMT=simt)
        errors = (line for line in done.stdout.splitlines() if "error" in line)
        return next(errors, done.stdout) if done.returncode else None

    def test(self, *arguments: str) -> tuple[str, str] | bool:
        """The first test that fails and the first line of why; or whether there was a test."""
        options = ("-x", "-q", "--tb=short", "-p", "no:cacheprovider")
        self.output.unlink(missing_ok=True)
        self.server.stdin.write(json.dumps([str(self.output), *options, *arguments]) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        shown = self.output.read_text(errors="replace")
        if status in (0, 5):
            return status == 0
        if found := FAILED.search(shown):
            return found[1], (found[2] or "").strip()
        if status < 0 and (crashed := CRASHED.search(shown)):
            return "::".join(crashed.groups()), f"signal {-status}"
        raise SystemExit(f"pytest fails ({status}):\n{shown[-3000:]}")


class Runner:
    def __init__(self, tree: Path, work: Path, options: argparse.Namespace, simt: bool) -> None:
        self.selection = shlex.split(options.tests)
        self.pristine = Copy(tree, work / "pristine", options.isas)
        if error := self.pristine.build(simt):
            raise SystemExit(f"does not build without a fault: {error}")
        shown = self.pristine.run("-c", "from kdkernels import _C; print(_C.__file__)").stdout
        if not shown.startswith(str(work)):
            raise SystemExit(f"the tests would not run on the copy:\n{shown}")
        self.free: SimpleQueue[Copy] = SimpleQueue()
        for i in range(options.jobs):
            copy = Copy(tree, work / str(i), options.isas)
            copy.take_over(self.pristine.folder, "build", "kdkernels")
            self.free.put(copy)
        self.lock = threading.Lock()
        self.innocent: dict[str, bool] = {}  # tests that pass where no fault is planted

    def try_one(self, mutant: Mutant) -> dict[str, Any]:
        copy, begin = self.free.get(), time.monotonic()
        text = (path := copy.folder / mutant.file).read_text()
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            result = self.verdict(mutant, copy)
        finally:
            path.write_text(text)
            self.free.put(copy)
        return {"id": mutant.id, **result, "seconds": round(time.monotonic() - begin, 1)}

    def verdict(self, mutant: Mutant, copy: Copy) -> dict[str, str]:
        if mutant.file.startswith("csrc") and (error := copy.build(mutant.layer == "cuda")):
            return {"verdict": "did not build", "message": error}
        file, _, test = FIRST.get(mutant.id, "").partition(" ")
        files = [(file, "-k", test)] if test else []
        # One by one, because it takes long to collect all of them.
        files += [(name,) for name in LAYERS[mutant.layer].split()]
        results = []
        for name, *chosen in files:
            if (copy.folder / (path := f"tests/test_{name}.py")).is_file():
                results.append(copy.test(path, *chosen, *self.selection))
                if isinstance(results[-1], tuple):
                    break
        if not any(results):
            raise SystemExit(f"{mutant.layer}: {shlex.join(self.selection)} leaves no test")
        if not isinstance(results[-1], tuple):
            return {"verdict": "SURVIVED"}
        test, message = results[-1]
        with self.lock:
            if test not in self.innocent:
                whole_file = () if "::" in test else ("--collect-only",)
                self.innocent[test] = self.pristine.test(test, "-m", "", *whole_file) is True
        verdict = "killed" if self.innocent[test] else "unclear"
        return {"verdict": verdict, "test": test, "message": message}


def show(result: dict[str, Any]) -> None:
    why = " ".join(result[x] for x in ("test", "message") if x in result)
    print(f"{result['verdict']:9} {result['id']}, {result['seconds']} s  {why}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=[*LAYERS])
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults")
    parser.add_argument("--list", action="store_true", help="show the faults, run nothing")
    parser.add_argument("--tests", default="-m 'not gate'", metavar="ARGS", help="of pytest")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another checkout")
    parser.add_argument("--jobs", "-j", type=int, default=1, help="faults at a time")
    parser.add_argument("--isas", default="baseline", help="the CPU's instruction sets to build")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.jsonl")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}; must be at least 1")
    wanted = set(options.only or (x.id for x in MUTANTS))
    mutants = [x for x in MUTANTS if x.layer in options.layers and x.id in wanted]
    tree = options.tree.resolve()
    unknown = sorted(set(options.only or ()) - {x.id for x in mutants})
    if errors := [f"{x}: no such fault" for x in unknown] + broken(mutants, tree):
        raise SystemExit("\n".join(errors))
    if options.list:
        print("\n".join(f"{x.id}: {x.why}" for x in mutants))
        return

    matters = re.compile(r"(csrc|kdkernels|triton_kernels|tests)/(?!mutants)")
    code = filter(matters.match, files_of(tree))
    state = digest(*((tree / x).read_bytes() for x in code), options.tests, options.isas)
    keys = {x.id: digest(state, repr(x)) for x in mutants}
    results: dict[str, dict[str, Any]] = {}
    if options.out.exists():
        lines = [json.loads(line) for line in options.out.read_text().splitlines()]
        results = {x["id"]: x for x in lines if keys.get(x["id"]) == x["key"]}
    for result in results.values():
        show(result)
    left = [x for x in mutants if x.id not in results]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as work, options.out.open("a") as out:
        simt = any(x.layer == "cuda" for x in left)
        runner = Runner(tree, Path(work), options, simt) if left else None
        with ThreadPoolExecutor(options.jobs) as pool:
            try:
                for done in as_completed(pool.submit(runner.try_one, x) for x in left):
                    result = done.result()
                    results[result["id"]] = result
                    show(result)
                    out.write(json.dumps({**result, "key": keys[result["id"]]}) + "\n")
                    out.flush()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    verdicts = [x["verdict"] for x in results.values()]
    print(", ".join(f"{verdicts.count(x)} {x}" for x in sorted(set(verdicts))))
    sys.exit(verdicts.count("killed") < len(mutants))


if __name__ == "__main__":
    main()
