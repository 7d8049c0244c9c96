"""Results as tables, files, and the parts of README.md and docs/performance.md that they make."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import providers
from bench.cases import DIRECTIONS, DTYPES, LAYOUTS, LOSSES, Case
from bench.measure import EXPONENTIALS_PER_CLOCK, MIB
from bench.run import COPY, Record, case_of, pool_copies

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/performance.md")

Report = dict[str, Any]  # "command", "facts", "records"


# ------------------------------------------------------------------------------------------- tables
def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned text: the first column to the left, the others to the right; "-" for None."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


def number(value: float | None, digits: int = 3) -> str | None:
    """Three significant digits, without an exponent where one can read it."""
    if value is None or math.isnan(value):
        return None
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:.{max(0, digits - before)}f}"


def times(value: float | None) -> str | None:
    """A ratio in two digits, as in 4.6x and 46x."""
    return None if value is None else f"{number(value, 2)}x"


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def spread(record: Record) -> str:
    return f"{number(record['ms'])} [{number(record['ms_p20'])}-{number(record['ms_p80'])}]"


def _error(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}"


class Results:
    """The records of a run, by case and provider."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.by_case: dict[Case, dict[str, Record]] = {}
        for record in records:
            self.by_case.setdefault(case_of(record), {})[record["provider"]] = record

    def ratio(self, case: Case, other: str, name: str) -> float | None:
        """How many times longer `other` takes than `name`."""
        records = self.by_case[case]
        if "ms" not in records.get(other, {}) or "ms" not in records.get(name, {}):
            return None
        return records[other]["ms"] / records[name]["ms"]

    def peers(self, case: Case, name: str) -> str | None:
        """The same for the other libraries."""
        found = {x: self.ratio(case, x, name) for x in providers.PEERS}
        return ", ".join(f"{x} {times(y)}" for x, y in found.items() if y is not None) or None


HEADER = ["case", "provider", "ms [20th-80th percentile]", "GB/s", "of copy", "Gexp/s"]
VERSUS = [f"vs {name.replace('_', ' ')}" for name in providers.BASELINES]
HEADER += [*VERSUS, "peak MiB", "/ gradient", "loss error", "grad error"]


def lines_of(case: Case, results: Results) -> list[list[object]]:
    """One line for each provider of a case, under `HEADER`."""
    lines: list[list[object]] = []
    for name, record in results.by_case[case].items():
        line: list[object] = [str(case), name]
        if "missing" in record:
            lines.append([*line, f"no result: {record['missing']}"] + [None] * (len(HEADER) - 3))
            continue
        line += [spread(record), number(record["gb_per_s"]), percent(record["share_of_copy"])]
        rate = record.get("exponentials_per_s")
        line.append(None if rate is None else number(rate / 1e9))
        fused = name in providers.FUSED or name in providers.PEERS
        for other in providers.BASELINES:
            line.append(times(results.ratio(case, other, name)) if fused else None)
        peak = record.get("peak_bytes")
        line += [None if peak is None else number(peak / x) for x in (MIB, case.tensor_bytes)]
        line += [_error(record.get("loss_error")), _error(record.get("grad_error"))]
        lines.append(line)
    return lines


def summary(records: Sequence[Record]) -> str:
    """All of a run as text; providers without a result follow the table."""
    results = Results(records)
    lines = [line for case in results.by_case for line in lines_of(case, results)]
    measured = [line for line in lines if not str(line[2]).startswith("no result")]
    text = table(HEADER, measured)
    for line in lines:
        if line not in measured:
            text += f"\n{line[0]}, {line[1]}: {line[2]}"
    return text


# -------------------------------------------------------------------------------------------- goals
# How many times faster than eager and torch.compile of it on two cores of a CPU, with fresh memory
# (--malloc default); float32 and bfloat16.
_LARGE = {"kd": (30, 6), "dkd": (70, 20)}
CPU_RATIOS = {
    (512, 32000): _LARGE,
    (128, 128256): _LARGE,
    (1024, 1000): {"kd": (10, 6), "dkd": (35, 18)},
    (4096, 100): {"kd": (9, 6), "dkd": (25, 12)},
}
CPU_SHARE = 0.4  # of the copy: KD in float32 at the two large shapes
GPU_RATIOS = {(4096, 128256): (10, 3)}
# Of the copy on a GPU: rows in registers, in a cluster's shared memory, and read twice.
GPU_SHORT, GPU_SHARE, GPU_CLUSTER, GPU_TWICE = 16384, 0.8, 0.9, 0.6
BYTES_PER_ROW, BYTES_PER_CALL = 256, 64 << 10  # beside the gradient


def goals(report: Report) -> list[tuple[str, float, float, bool]]:
    """What was hoped for, in cases that were measured: (what, measured, goal, at least or most)."""
    results, out = Results(report["records"]), []
    gpu = "gpu" in report["facts"]
    for case, records in results.by_case.items():
        if case.direction != "both" or case.layout != "dense" or case.ignored:
            continue
        shape = (case.rows, case.classes)
        for name, record in records.items():
            if name not in providers.FUSED or "missing" in record:
                continue
            ratios = GPU_RATIOS.get(shape) if gpu else CPU_RATIOS.get(shape, {}).get(case.loss)
            if not gpu and report["settings"]["malloc"] != "default":
                ratios = None
            if ratios and case.dtype in ("float32", "bfloat16"):
                for other, goal in zip(("eager", "compile"), ratios, strict=True):
                    ratio = results.ratio(case, other, name)
                    if ratio is not None:
                        out.append(
                            (f"{case}, {name}: times faster than {other}", ratio, goal, True)
                        )
            goal = None
            if gpu and case.rows > 64:
                clusters = float(report["facts"]["capability"]) >= 9 and name == "cuda"
                long = GPU_CLUSTER if clusters else GPU_TWICE
                goal = GPU_SHARE if case.classes <= GPU_SHORT else long
            elif CPU_RATIOS.get(shape) is _LARGE and (case.loss, case.dtype) == ("kd", "float32"):
                goal = CPU_SHARE
            if goal:
                what = f"{case}, {name}: share of the copy's bandwidth"
                out.append((what, record["share_of_copy"], goal, True))
            extra = (record["peak_bytes"] - case.tensor_bytes - BYTES_PER_CALL) / case.rows
            what = f"{case}, {name}: bytes per row beside the gradient"
            out.append((what, max(0.0, extra), BYTES_PER_ROW, False))
    return out


def goals_text(report: Report) -> str:
    found = goals(report)
    met = [value >= goal if least else value <= goal for _, value, goal, least in found]
    lines = [f"Goals, for information: {sum(met)} of {len(found)} met."]
    lines += [
        f"  not met: {what}: {number(value)}, goal {'>=' if least else '<='} {goal:g}"
        for (what, value, goal, least), ok in zip(found, met, strict=True)
        if not ok
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- files
def folder_of(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def write(out: Path, report: Report) -> list[Path]:
    """results.json, and its records as results.csv, each with what is needed to place it."""
    out.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = out / "results.json", out / "results.csv"
    as_json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    facts = report["facts"]
    place = {
        "machine": facts.get("gpu", facts["cpu"]),
        **{key: facts.get(key) for key in ("torch", "triton", "cuda", "commit", "measured")},
        "command": report["command"],
    }
    columns = list(dict.fromkeys(key for record in report["records"] for key in record))
    with as_csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *place])
        writer.writeheader()
        writer.writerows(record | place for record in report["records"])
    return [as_json, as_csv]


def kept(folder: Path | None = None) -> dict[str, Report]:
    """The results kept with the project, by their folder; those of GPUs first."""
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((folder or RESULTS).glob("*/results.json"))
    }
    for report in found.values():
        pool_copies(report["records"])  # files of before have a copy for each case
    return dict(sorted(found.items(), key=lambda item: "gpu" not in item[1]["facts"]))


# -------------------------------------------------------------------------------------------- pages
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
# Of one card: bytes per second of its memory, multiprocessors, highest clock, as its maker says.
GPUS = {
    "A100 80 GB": (2.04e12, 108, 1.41e9),
    "H100 SXM": (3.35e12, 132, 1.98e9),
    "H200": (4.8e12, 132, 1.98e9),
    "B200": (8.0e12, 148, 1.965e9),
    "L40S": (0.864e12, 142, 2.52e9),
    "RTX 5090": (1.792e12, 170, 2.407e9),
}


def machine_line(report: Report) -> str:
    facts = report["facts"]
    if "gpu" in facts:
        what = f"{facts['gpu']}, CUDA {facts['cuda']}, triton {facts['triton']}"
    else:
        load = facts["load_average"][0]
        what = f"{facts['cpu']}, {facts['threads']} threads, {facts['torch_isa']}, load {load}"
    return f"{what}, torch {facts['torch']}, commit {facts['commit']}, {facts['measured']}"


def headline(reports: dict[str, Report]) -> dict[str, Report]:
    """What README shows of them, of those that were measured as `python -m bench` does, beside the
    published formulations.

    All GPUs, and the CPU that was measured last.
    """
    plain = {
        folder: report
        for folder, report in reports.items()
        if report["settings"]["sets"] is None
        and report["settings"]["malloc"] != "default"
        and any(x["provider"] == "eager" for x in report["records"])
    }
    gpus = {folder: report for folder, report in plain.items() if "gpu" in report["facts"]}
    cpus = sorted(plain.keys() - gpus.keys(), key=lambda x: (plain[x]["facts"]["measured"], x))
    return gpus | {folder: plain[folder] for folder in cpus[-1:]}


def setting_line(report: Report) -> str:
    settings, out = report["settings"], []
    if settings["malloc"] == "keep":
        out.append("freed memory is kept by the C library, as a caching allocator does")
    if settings["malloc"] == "default":
        out.append("large tensors are fresh memory, as the C library's malloc makes them")
    if settings["sets"] == 1:
        out.append("small inputs stay in the cache")
    return "; ".join(out)


def _cell(case: Case, results: Results, name: str) -> str | None:
    record = results.by_case.get(case, {}).get(name, {})
    if "ms" not in record:
        return None
    compiled = [results.ratio(case, other, name) for other in providers.COMPILED]
    fastest = min((x for x in compiled if x is not None), default=None)
    ratios = [results.ratio(case, other, name) for other in ("eager", "plain")]
    shown = [times(x) or "-" for x in (*ratios, fastest)]
    return ", ".join([number(record["ms"]) or "", *shown, percent(record["share_of_copy"]) or ""])


def speed(reports: dict[str, Report]) -> str:
    """README's table. Each cell: ms, vs eager, vs plain, vs the faster one compiled, of copy."""
    parts = []
    for folder, report in headline(reports).items():
        results = Results(report["records"])
        measured = {
            case.loss
            for case, records in results.by_case.items()
            if any("ms" in records.get(name, {}) for name in providers.FUSED)
        }
        cases = [
            x
            for x in results.by_case
            if x.direction == "both" and not x.ignored and x.loss in measured
        ]
        names = [x for x in providers.FUSED if any(x in results.by_case[c] for c in cases)]
        for name in names:
            # The shapes at which most losses were measured.
            places = dict.fromkeys((x.rows, x.classes, x.dtype, x.layout) for x in cases)
            losses = dict.fromkeys(x.loss for x in cases)
            rows = []
            for place in places:
                cells = [
                    _cell(Case(loss, *place[:2], place[2], place[3]), results, name)
                    for loss in losses
                ]
                if sum(cell is not None for cell in cells) >= 3:
                    shape = Case("kd", *place[:2], place[2], place[3]).shape
                    rows.append([f"{shape} {SHORT[place[2]]}", *cells])
            if rows:
                head = f"[{folder}](bench/results/{folder}), backend {name}: {machine_line(report)}"
                titles = [LOSSES[loss].title for loss in losses]
                parts.append(f"{head}\n\n{markdown(['shape', *titles], rows)}")
    return "\n\n".join(parts) or "No results have been committed."


def limits() -> str:
    """What each loss must move and compute."""
    rows = []
    for name, spec in LOSSES.items():
        passes = [Case(name, 1, 1, direction=x).passes for x in DIRECTIONS]
        rows.append([spec.title, *passes, spec.exponentials])
    header = ["loss", *(f"NV, {x}" for x in DIRECTIONS), "exponentials per pair"]
    return markdown(header, rows)


def ceilings() -> str:
    """What that means on known GPUs."""
    case = Case("kd", 4096, 128256, "bfloat16")
    rows = []
    for name, (bandwidth, multiprocessors, clock) in GPUS.items():
        rate = EXPONENTIALS_PER_CLOCK * multiprocessors * clock
        pairs = case.rows * case.classes
        budgets = [
            number(rate / (bandwidth / (Case("kd", 1, 1, "bfloat16", direction=x).passes * 2)), 2)
            for x in ("both", "forward")
        ]
        rows.append(
            [
                name,
                number(bandwidth / 1e12),
                number(rate / 1e12),
                number(1e3 * case.bytes / bandwidth),
                number(1e3 * 2 * pairs / rate),
                *budgets,
            ]
        )
    header = ["GPU", "TB/s", "10^12 exponentials/s", "ms for the bytes", "ms for 2 exponentials"]
    header += ["exponentials per pair that fit, loss and gradient", "loss only"]
    return markdown(header, rows)


# What kernels move and compute, by how they hold a row: NV, and exponentials per pair.
DESIGNS = (
    ("exponentials kept", 3, 2),
    ("the same at two temperatures", 3, 3),
    ("logits kept, exponentials twice", 3, 4),
    ("the same at two temperatures", 3, 6),
    ("logits read twice from memory", 5, 4),
    ("the same at two temperatures", 5, 6),
)


def designs() -> str:
    """What it costs not to keep a row, or its exponentials, on each of these GPUs."""
    rows = []
    for name, passes, exponentials in DESIGNS:
        line: list[object] = [name, passes, exponentials]
        for bandwidth, multiprocessors, clock in GPUS.values():
            pairs = 4096 * 128256
            by_bytes = 1e3 * passes * 2 * pairs / bandwidth
            rate = EXPONENTIALS_PER_CLOCK * multiprocessors * clock
            by_unit = 1e3 * exponentials * pairs / rate
            bound = "" if by_bytes >= by_unit else " (exponentials)"
            line.append(f"{number(max(by_bytes, by_unit))}{bound}")
        rows.append(line)
    return markdown(["a kernel with", "NV", "exponentials", *GPUS], rows)


STANDING = ["case", "backend", "kernel", "ms [p20-p80]", "launch, ms", "limit, ms", "of copy"]
STANDING += [*VERSUS, "vs peers", "peak / gradient", "loss error", "grad error"]


def limit_ms(case: Case, records: dict[str, Record], facts: dict[str, Any]) -> float:
    """The least that the bytes take at the copy's bandwidth, and the exponentials at the GPU's."""
    copy = records[COPY]
    by_bytes = 1e-6 * case.bytes / (copy["gb_per_s"] / copy["share_of_copy"])
    rate = facts.get("exponentials_per_s")
    return max(by_bytes, 1e3 * case.exponentials / rate if rate else 0.0)


def standing(reports: dict[str, Report]) -> str:
    parts = []
    for folder, report in reports.items():
        results, rows = Results(report["records"]), []
        for case, records in results.by_case.items():
            for name, record in records.items():
                if name not in providers.FUSED or "missing" in record:
                    continue
                line = [str(case), name, record.get("regime"), spread(record)]
                line += [number(record.get("launch_ms"))]
                line += [number(limit_ms(case, records, report["facts"]))]
                line += [percent(record["share_of_copy"])]
                line += [times(results.ratio(case, x, name)) for x in providers.BASELINES]
                line += [results.peers(case, name)]
                line += [number(record["peak_bytes"] / case.tensor_bytes)]
                line += [_error(record["loss_error"]), _error(record.get("grad_error"))]
                rows.append(line)
        kept = [i for i in range(len(STANDING)) if any(row[i] is not None for row in rows)]
        rows = [[row[i] for i in kept] for row in rows]
        text = f"### {folder}\n\n{machine_line(report)}"
        if setting := setting_line(report):
            text += f"; {setting}"
        text += f". `{report['command']}`, {report['facts']['wall_seconds']:.0f} s.\n\n"
        text += markdown([STANDING[i] for i in kept], rows)
        for stem, what in PLOTS.items():
            if (RESULTS / folder / f"{stem}.svg").exists():
                text += f"\n\n![{what}](../bench/results/{folder}/{stem}.svg)"
        parts.append(text)
    return "\n\n".join(parts) or "No results have been committed."


PLOTS = {
    "time": "time per pair of logits against the number of classes",
    "bandwidth": "share of the copy's bandwidth against the number of classes",
    "memory": "peak memory in gradients against the number of classes",
}


def unmeasured(reports: dict[str, Report]) -> str:
    """What a run had no result for and why, and what it did not ask for."""
    lines = []
    if not any("gpu" in report["facts"] for report in reports.values()):
        lines.append(
            "- No result of a GPU: **nothing has run on a GPU yet.** CONTRIBUTING.md has the"
            " commands for a visit to one."
        )
    for folder, report in reports.items():
        reasons: dict[str, list[str]] = {}
        for record in report["records"]:
            if "missing" in record:
                what = f"{record['provider']}: {record['missing']}"
                reasons.setdefault(what, []).append(str(case_of(record)))
        for what, cases in reasons.items():
            where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
            lines.append(f"- {folder}, {what} ({where})")
        records = [record for record in report["records"] if "ms" in record]
        sides = (("loss", LOSSES), ("pass", DIRECTIONS), ("dtype", DTYPES), ("layout", LAYOUTS))
        absent = [
            f"{key} {value}"
            for key, values in sides
            for value in values
            if all(record[key] != value for record in records)
        ]
        cases = [x for x in Results(records).by_case.values() if set(x) & set(providers.FUSED)]
        compiled = sum("compile" in x for x in cases)
        absent.append(f"torch.compile in {len(cases) - compiled} of {len(cases)} cases")
        lines.append(f"- {folder}, not asked for: {', '.join(absent)}")
    return "\n".join(lines)


def blocks(reports: dict[str, Report]) -> dict[str, str]:
    return {
        "speed": speed(reports),
        "limits": limits(),
        "ceilings": ceilings(),
        "designs": designs(),
        "standing": standing(reports),
        "unmeasured": unmeasured(reports),
    }


_BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, parts: dict[str, str]) -> str:
    """A page with its blocks replaced; a block of another name is an error."""

    def replace(found: re.Match[str]) -> str:
        if found[2] not in parts:
            raise KeyError(f"no block {found[2]!r}; there are {', '.join(parts)}")
        return f"{found[1]}\n{parts[found[2]]}\n\n{found[3]}"

    return _BLOCK.sub(replace, text)


def rewrite_pages() -> list[Path]:
    """README.md and docs/performance.md from the committed results; those that changed."""
    parts, changed = blocks(kept()), []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = filled(before, parts)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed
