"""Distil on real handwritten digits with every loss, then time the losses at a large vocabulary.

    python examples/digits.py [--out demo_output] [--seeds 8]

The data are the 1797 scanned digits (8x8 pixels) that ship with scikit-learn; every image is seen
moved by up to one pixel each way, in training and in tests. A small convolutional teacher learns
from 754 labelled images. The students, perceptrons with one hidden layer, get 10 labelled images
per class and the teacher's logits on them: labels are scarce and the teacher knows more than they
say, which is where distillation should help.

Every student of a seed starts from the same weights and sees the same images in the same order;
only the loss differs. Loss parameters are the papers' (KD: 0.1 CE + 0.9 KD at T = 4; the others at
their defaults, added to CE); none was tuned here. The task, the student and the number of epochs
were fixed once on validation images; the learning rate is the one that suits plain cross-entropy
best on them, over seeds that are not reported. Test accuracies are those of the last epoch, over
all nine positions of the test images.

AEKT is kdkernels' default variant, derived from a published summary of the paper: its full text was
not available when the loss was built.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

# `bench` lies beside this folder; an installed kdkernels comes first, hence at the end.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import kdkernels
from bench import measure, providers, report
from bench.cases import Case
from bench.run import COPY, Runner

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10
SHIFTS = 9  # positions of an image: 3 down x 3 right
PER_CLASS = 10
HIDDEN = 128
EPOCHS = 200
BATCH = 32
EVERY = 10  # epochs between two points of a learning curve
LEARNING_RATES = (1e-2, 3e-2, 1e-1)
CHOICE_SEEDS = (1000, 1001, 1002)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


# --------------------------------------------------------------------------------------- the losses
def ce(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student, target)


def kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return 0.9 * kdkernels.kd_loss(student, teacher, target, temperature=4.0, ce_weight=1 / 9)


def dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return kdkernels.dkd_loss(student, teacher, target, ce_weight=1.0)


def nkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return kdkernels.nkd_loss(student, teacher, target, ce_weight=1.0)


def tf_nkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return kdkernels.tf_nkd_loss(student, target, ce_weight=1.0)


def aekt(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return kdkernels.aekt_loss(student, teacher, target, ce_weight=1.0)


class SerializedAEKT(nn.Module):
    """AEKT's layout: cross-entropy on the class logits, distillation behind one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.serialization = kdkernels.TaskSerialization(CLASSES)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        distilled = kdkernels.aekt_loss(self.serialization(student), teacher, target)
        return F.cross_entropy(student, target) + distilled


METHODS: dict[str, Callable[[], Loss]] = {
    "CE": lambda: ce,
    "tf-NKD": lambda: tf_nkd,
    "KD": lambda: kd,
    "DKD": lambda: dkd,
    "NKD": lambda: nkd,
    "AEKT": lambda: aekt,
    "AEKT + serialisation": SerializedAEKT,
}


# -------------------------------------------------------------------------------- data and networks
@dataclass
class Digits:
    """Views (n, SHIFTS, 8, 8) in [0, 1], labels (n,), and the index sets."""

    views: Tensor
    labels: Tensor
    pool: Tensor
    validation: Tensor
    test: Tensor

    @staticmethod
    def load() -> Digits:
        data = load_digits()
        rest, test = train_test_split(
            range(len(data.target)), test_size=0.4, stratify=data.target, random_state=0
        )
        pool, validation = train_test_split(
            rest, test_size=0.3, stratify=data.target[rest], random_state=0
        )
        padded = F.pad(torch.tensor(data.images, dtype=torch.float32) / 16.0, (1, 1, 1, 1))
        moved = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        sets = [torch.tensor(indices) for indices in (pool, validation, test)]
        return Digits(torch.stack(moved, dim=1), torch.tensor(data.target), *sets)

    def few(self, seed: int) -> Tensor:
        """PER_CLASS images of each class from the pool, another draw for every seed."""
        order = self.pool[torch.randperm(len(self.pool), generator=generator(seed))]
        labels = self.labels[order]
        return torch.cat([order[labels == label][:PER_CLASS] for label in range(CLASSES)])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Teacher(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 8)),
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 16, CLASSES),
        )


class Student(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def batches(
    parameters: Iterable[nn.Parameter], count: int, epochs: int, rate: float, rng: torch.Generator
) -> Iterable[tuple[int, Tensor, Callable[[Tensor], None]]]:
    """Yields (epoch, indices, step): `step(loss)` makes one update on a one-cycle schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2, foreach=True)
    total = epochs * -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    for epoch in range(1, epochs + 1):
        for indices in torch.randperm(count, generator=rng).split(BATCH):
            yield epoch, indices, step


def random_views(count: int, rng: torch.Generator) -> Tensor:
    return torch.randint(SHIFTS, (count,), generator=rng)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, indices: Tensor) -> float:
    """Per cent, over all views."""
    guess = model(digits.views[indices].flatten(0, 1)).argmax(1).view(-1, SHIFTS)
    return 100.0 * (guess == digits.labels[indices, None]).float().mean().item()


def train_teacher(digits: Digits, epochs: int = 15, seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    teacher, rng = Teacher(), generator(seed)
    views, labels = digits.views[digits.pool], digits.labels[digits.pool]
    with tqdm(total=epochs, desc="teacher, epochs", file=sys.stderr) as bar:
        for epoch, indices, step in batches(teacher.parameters(), len(views), epochs, 3e-3, rng):
            images = views[indices, random_views(len(indices), rng)]
            step(F.cross_entropy(teacher(images), labels[indices]))
            bar.update(epoch - bar.n)
    return teacher.eval()


@dataclass
class Run:
    """One trained student: its learning curve on the validation images, its test accuracy."""

    method: str
    seed: int
    epochs: list[int]
    curve: list[float]
    test: float


def train_student(
    digits: Digits, teacher_logits: Tensor, method: str, seed: int, rate: float
) -> Run:
    """`teacher_logits` (n, SHIFTS, CLASSES) are those of the very view that the student sees."""
    torch.manual_seed(seed)
    student, loss = Student(), METHODS[method]()
    parameters = list(student.parameters())
    if isinstance(loss, nn.Module):
        parameters += loss.parameters()
    chosen, rng = digits.few(seed), generator(seed)
    views, labels, knowledge = digits.views[chosen], digits.labels[chosen], teacher_logits[chosen]
    run = Run(method, seed, [], [], 0.0)

    def mark(epoch: int) -> None:
        run.epochs.append(epoch)
        run.curve.append(accuracy(student, digits, digits.validation))

    last = 0
    for epoch, indices, step in batches(parameters, len(chosen), EPOCHS, rate, rng):
        if last and epoch != last and last % EVERY == 0:
            mark(last)
        last = epoch
        view = random_views(len(indices), rng)
        logits = student(views[indices, view])
        step(loss(logits, knowledge[indices, view], labels[indices]))
    mark(EPOCHS)
    run.test = accuracy(student, digits, digits.test)
    return run


# ------------------------------------------------------------------------------------------ results
def accuracy_table(runs: Sequence[Run]) -> str:
    plain = {run.seed: run.test for run in runs if run.method == "CE"}
    lines = []
    for method in METHODS:
        own = [run for run in runs if run.method == method]
        tests = [run.test for run in own]
        gains = [run.test - plain[run.seed] for run in own]
        lines.append(
            [
                method,
                f"{mean(tests):.2f} ± {stdev(tests):.2f}",
                f"{min(tests):.2f}",
                f"{max(tests):.2f}",
                "-" if method == "CE" else f"{mean(gains):+.2f} ± {stdev(gains):.2f}",
            ]
        )
    header = ["loss", "test accuracy %", "worst", "best", "over CE, same seed"]
    return report.table(header, lines)


def plot(runs: Sequence[Run], teacher_test: float, teacher_validation: float, path: Path) -> None:
    colours = dict(zip(METHODS, ["#6b6b6b", "#b08a3e", *plt.cm.tab10.colors[:5]], strict=True))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.3), width_ratios=(1.15, 1), layout="constrained"
    )
    for place, method in enumerate(METHODS):
        own = [run for run in runs if run.method == method]
        tests = [run.test for run in own]
        colour = colours[method]
        spread = [place + 0.22 * (i / max(1, len(tests) - 1) - 0.5) for i in range(len(tests))]
        left.scatter(spread, tests, s=14, color=colour, alpha=0.45, linewidths=0)
        left.errorbar(
            place, mean(tests), stdev(tests), fmt="D", color=colour, capsize=5, markersize=6
        )
        left.annotate(
            f"{mean(tests):.1f}", (place, mean(tests)), (12, -3), textcoords="offset points"
        )
        curves = zip(*(run.curve for run in own), strict=True)
        right.plot(own[0].epochs, [mean(values) for values in curves], color=colour, label=method)
    left.axhline(teacher_test, color="black", linestyle=":", linewidth=1)
    left.annotate("teacher", (len(METHODS) - 0.5, teacher_test), ha="right", va="bottom")
    left.set_xticks(
        range(len(METHODS)), [name.replace(" + ", "\n+ ") for name in METHODS], fontsize=9
    )
    left.set_xlim(-0.5, len(METHODS) - 0.3)
    left.set_ylabel("test accuracy, %")
    seeds = len({run.seed for run in runs})
    left.set_title(f"last epoch: {seeds} seeds, mean and standard deviation", fontsize=10)
    right.axhline(teacher_validation, color="black", linestyle=":", linewidth=1)
    right.set_xlabel("epoch")
    right.set_ylabel("validation accuracy, %")
    right.set_title("learning curves, mean over the seeds", fontsize=10)
    right.set_ylim(50, 100)
    right.set_xlim(0, EPOCHS)
    right.legend(fontsize=8, loc="lower right", frameon=False)
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"scikit-learn digits, moved by up to a pixel: students with {HIDDEN} hidden units, "
        f"{PER_CLASS} labelled images per class",
        fontsize=12,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_runs(runs: Sequence[Run], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "test_accuracy", "validation_accuracy"])
        writer.writerows([run.method, run.seed, run.test, run.curve[-1]] for run in runs)


def speed_table(rows: int, classes: int) -> str:
    """Time and peak memory of KD and DKD on the CPU, measured as `python -m bench` does."""
    names = ("cpu", *providers.BASELINES)
    lines, missing = [], []
    with tqdm(total=2, desc="timing (torch.compile compiles)", file=sys.stderr) as bar:
        runner = Runner(measure.Cpu(), names, seconds=5.0)
        for case in (Case(loss, rows, classes) for loss in ("kd", "dkd")):
            results = report.Results(runner.measure(case))
            bar.update()
            for name, record in results.by_case[case].items():
                if "missing" in record:
                    missing.append(f"no result for {case}, {name}: {record['missing']}")
                elif name != COPY:
                    title = "kdkernels" if name == "cpu" else f"torch {name}"
                    lines.append(
                        [
                            f"{case.spec.title}, {title}",
                            report.spread(record),
                            report.times(results.ratio(case, name, "cpu")),
                            report.number(record["peak_bytes"] / measure.MIB),
                            report.number(record["peak_bytes"] / case.tensor_bytes),
                            f"{record['grad_error']:.1e}",
                        ]
                    )
    header = ["loss", "ms [20th-80th percentile]", "/ kdkernels", "peak MiB", "/ gradient"]
    return "\n".join([report.table([*header, "gradient error"], lines), *missing])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--seeds", type=int, default=8, help="students per loss, at least 2")
    parser.add_argument("--rows", type=int, default=256, help="of the timing")
    parser.add_argument("--classes", type=int, default=32000, help="of the timing")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: a spread needs at least 2")
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    state = kdkernels.backends()["cpu"]
    print("kdkernels' cpu backend: " + ("available" if state.available else state.reason))
    torch.set_num_threads(1)  # the networks are too small to share between cores
    digits = Digits.load()
    teacher = train_teacher(digits)
    teacher_test = accuracy(teacher, digits, digits.test)
    teacher_validation = accuracy(teacher, digits, digits.validation)
    print(
        f"teacher: {len(digits.pool)} images, test accuracy {teacher_test:.2f} % "
        f"on {len(digits.test)} images in {SHIFTS} positions"
    )
    with torch.no_grad():
        teacher_logits = teacher(digits.views.flatten(0, 1)).view(-1, SHIFTS, CLASSES)

    trials = [(rate, seed) for rate in LEARNING_RATES for seed in CHOICE_SEEDS]
    found: dict[float, list[float]] = {rate: [] for rate in LEARNING_RATES}
    for rate, seed in tqdm(trials, desc="learning rate, CE on validation", file=sys.stderr):
        found[rate].append(train_student(digits, teacher_logits, "CE", seed, rate).curve[-1])
    rate = max(found, key=lambda rate: mean(found[rate]))
    tried = ", ".join(f"{rate:g}: {mean(scores):.2f} %" for rate, scores in found.items())
    print(f"learning rate {rate:g} for all losses (CE on validation: {tried})")

    jobs = [(seed, method) for seed in range(options.seeds) for method in METHODS]
    runs = []
    with tqdm(jobs, desc="students", file=sys.stderr) as bar:
        for seed, method in bar:
            bar.set_postfix_str(f"seed {seed}, {method}")
            runs.append(train_student(digits, teacher_logits, method, seed, rate))
    print(f"\nStudents, {CLASSES * PER_CLASS} labelled images, {options.seeds} seeds:\n")
    print(accuracy_table(runs))
    plot(runs, teacher_test, teacher_validation, options.out / "digits.png")
    write_runs(runs, options.out / "digits.csv")

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    print(
        f"\nForward + backward at {options.rows} rows x {options.classes} classes, float32, "
        f"{torch.get_num_threads()} threads:\n"
    )
    speed = speed_table(options.rows, options.classes)
    print(speed)
    (options.out / "speed.txt").write_text(speed + "\n")
    names = ", ".join(str(options.out / name) for name in ("digits.png", "digits.csv", "speed.txt"))
    print(f"\nwritten: {names}  ({time.perf_counter() - began:.0f} s in all)")


if __name__ == "__main__":
    main()
