"""Plots of a run's results: time, share of the copy's bandwidth and memory against classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import providers
from bench.cases import Case
from bench.report import PLOTS, SHORT, Report, Results
from bench.run import COPY, Record

COLOURS = {
    "cuda": "#1b7837",
    "triton": "#7fbf7b",
    "cpu": "#1b7837",
    "eager": "#b2182b",
    "plain": "#d6604d",
    "compile": "#ef8a62",
    "plain_compile": "#fdae61",
    COPY: "#888888",
    "liger": "#2166ac",
    "flash_attn": "#67a9cf",
    "quack": "#762a83",
}

Value = Callable[[Case, Record], float | None]


def _nanoseconds_per_pair(case: Case, record: Record) -> float:
    scale = case.bytes / record["bytes"]  # of the copy, to the bytes of the case
    return 1e6 * scale * record["ms"] / (case.rows * case.classes)


VALUES: dict[str, tuple[str, bool, Value]] = {  # label of the axis, logarithmic, value
    "time": ("ns per pair of logits", True, _nanoseconds_per_pair),
    "bandwidth": (
        "share of the copy's bandwidth",
        False,
        lambda case, record: record["share_of_copy"],
    ),
    "memory": (
        "peak memory / logits of the student",
        True,
        lambda case, record: record.get("peak_bytes", 0) / case.tensor_bytes or None,
    ),
}


def draw(report: Report, out: Path) -> list[Path]:
    """One file for each of `PLOTS`, with a panel for each loss and dtype at several sizes.

    Nothing is drawn where no loss was measured at two numbers of classes. Raises ImportError
    without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = Results(report["records"])
    panels: dict[tuple[str, str], list[Case]] = {}
    for case, records in results.by_case.items():
        plain = case.direction == "both" and case.layout == "dense" and not case.ignored
        if plain and COPY in records:
            panels.setdefault((case.spec.title, case.dtype), []).append(case)
    for key, cases in panels.items():
        # Of the cases with so many classes the one that most computed, and of these the largest.
        chosen = {
            case.classes: case
            for case in sorted(cases, key=lambda x: (len(results.by_case[x]), x.rows))
        }
        panels[key] = [chosen[classes] for classes in sorted(chosen)]
    panels = {key: cases for key, cases in panels.items() if len(cases) > 1}
    if not panels:
        return []
    # The same file again from the same results.
    style = {"svg.hashsalt": "kdkernels", "svg.fonttype": "none", "font.size": 9}
    paths = []
    for stem, what in PLOTS.items():
        with matplotlib.rc_context(style):
            columns = min(4, len(panels))
            rows = math.ceil(len(panels) / columns)
            figure, axes = plt.subplots(
                rows, columns, figsize=(3.4 * columns, 2.7 * rows), squeeze=False, sharey=True
            )
            for place, ((title, dtype), cases) in zip(axes.flat, panels.items(), strict=False):
                _panel(place, cases, results, *VALUES[stem])
                place.set_title(f"{title}, {SHORT[dtype]}", fontsize=9)
            for place in list(axes.flat)[len(panels) :]:
                place.set_axis_off()
            handles = {}
            for place in axes.flat:
                for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
                    handles.setdefault(label, handle)
            figure.suptitle(f"{what}; loss and gradient", fontsize=10)
            figure.tight_layout(rect=(0, 0.06, 1, 1))
            figure.legend(
                handles.values(), handles, loc="lower center", ncols=len(handles), frameon=False
            )
            path = out / f"{stem}.svg"
            figure.savefig(path, metadata={"Date": None})
            plt.close(figure)
            paths.append(path)
    return paths


def _panel(
    place, cases: Sequence[Case], results: Results, label: str, log: bool, value: Value
) -> None:
    for name in (COPY, *providers.NAMES):
        points = []
        for case in cases:
            record = results.by_case[case].get(name, {})
            height = value(case, record) if "ms" in record else None
            if height is not None:
                points.append((case.classes, height))
        if points:
            line = "--" if name == COPY else "-"
            place.plot(
                *zip(*points, strict=True),
                line,
                marker="o",
                ms=3,
                lw=1.2,
                color=COLOURS[name],
                label=name,
            )
    place.set_xscale("log")
    if log:
        place.set_yscale("log")
    else:
        place.set_ylim(bottom=0)
    place.minorticks_off()
    place.set_xlabel("classes")
    if place.get_subplotspec().is_first_col():
        place.set_ylabel(label)
    place.grid(alpha=0.25)
    place.spines[["top", "right"]].set_visible(False)
