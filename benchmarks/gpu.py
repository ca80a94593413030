"""Measure a GPU in one go: the tests marked `gpu`, then the benchmarks at full shapes, on one page.

    make gpu                              # docs/measured/CARD.md, in ten minutes on an H100
    python benchmarks/gpu.py --only nf4   # some of it
    python benchmarks/gpu.py --small      # tiny shapes on the CPU: that it runs to the end, nothing is measured

Every part runs in a process of its own, so that a fault or a lack of memory in one is a row that says so. The page is
written after each part. The exit code is 1 where a test or a part failed, 0 otherwise; a part that by its own estimate
does not fit the card is left out, and a target that is missed is a result.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from glance import start


if __name__ == "__main__":
    start.as_script("the page holds what was measured before")

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import io
import json
import platform
import re
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

import torch

from glance import command_line as cli
from glance.ask.pipeline import first_line
from glance_utils import InputError


ROOT = Path(__file__).parent.parent
STEPS_OF_A_PAIR = 2 * 60  # --max_train_steps' default, for both phases
SMALL = {"flux-dev": "tiny-flux", "sd3.5-large": "tiny-sd3.5", "qwen-image": "tiny-qwen"}
SMALL_FLAGS = "--device cpu --rank 4 --text_tokens 64 --steps 2 --warmup 1"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")
TOO_LARGE = "by the estimate"  # in what a benchmark says of a shape that does not fit
SAVING = "--gradient_checkpointing --use_8bit_adam --quantization"
STEPS = [
    "--shape flux-dev",
    "--shape flux-dev --compile",
    "--shape flux-dev --gradient_checkpointing",
    f"--shape flux-dev {SAVING} nf4",
    f"--shape flux-dev {SAVING} int8",
    f"--shape flux-dev {SAVING} fp8",
    "--shape sd3.5-large",
    f"--shape sd3.5-large {SAVING} nf4",
    "--shape qwen-image --gradient_checkpointing",
    f"--shape qwen-image {SAVING} nf4",
]
INFERENCE = ["--shape flux-dev --steps 3 --warmup 1", "--shape sd3.5-large --steps 3 --warmup 1"]
AGAINST = ["--shape flux-dev --gradient_checkpointing --steps 5"]


@dataclass
class Part:
    """A benchmark with its flags and, once it ran, what came of it."""

    script: str
    flags: str
    result: dict | None = None
    error: str | None = None
    left_out: bool = False

    @property
    def command(self) -> str:
        """Return the command that does the same."""
        return f"python benchmarks/{self.script}.py {self.flags}"


@dataclass
class Tests:
    """What came of the tests marked `gpu`."""

    passed: int = 0
    failed: dict | None = None  # by test, the first line of its error
    skipped: dict | None = None  # by reason, how many
    error: str | None = None


@dataclass
class Target:
    """What was hoped for: a value of at most `limit`, or of at least that where `least`."""

    name: str
    value: float | None
    limit: float
    unit: str
    least: bool = False

    def shown(self) -> str:
        """Return the value in three digits with its unit; nothing where there is none."""
        return "" if self.value is None else f"{self.value:.3g} {self.unit}"

    def verdict(self) -> str:
        """Return "met", "missed by N %" of the limit, or "not measured"."""
        if self.value is None:
            return "not measured"
        short = (self.limit - self.value if self.least else self.value - self.limit) / self.limit
        return "met" if short <= 0 else f"missed by {100 * short:.1f} %"


# --------------------------------------------------------------------------------------------------------------------
# Running


def parts_of(small: bool, only: str) -> list[Part]:
    """Return the parts whose command matches the regular expression; with `small`, of tiny shapes and uncompiled."""
    scripts = {"train_step": STEPS, "infer": INFERENCE, "against_diffusers": AGAINST}
    parts = [Part(script, flags) for script, all_flags in scripts.items() for flags in all_flags]
    if small:
        parts = [part for part in parts if "--compile" not in part.flags]
        for part in parts:
            flags = re.sub(r"--shape (\S+)", lambda match: f"--shape {SMALL[match[1]]}", part.flags)
            part.flags = f"{re.sub(' --(steps|warmup) [0-9]+', '', flags)} {SMALL_FLAGS}"
    return [part for part in parts if re.search(only, part.command)]


def run(part: Part, seconds: float, here: bool) -> None:
    """Run a part in a process of its own, or `here`; fill in what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        flags = [*part.flags.split(), "--json", str(path)]
        try:
            code, output = call_here(part.script, flags) if here else call(part.script, flags, seconds)
        except subprocess.TimeoutExpired:
            part.error = f"not done after the {seconds:.0f} s that were left"
            return
        if code == 0 and path.exists():
            part.result = json.loads(path.read_text())
            return
    lines = [line for line in output.splitlines() if line.strip()]
    part.error = (lines or [f"exit code {code}"])[-1][:300]
    part.left_out = code == 2 and TOO_LARGE in part.error
    if not part.left_out:
        print(output, file=sys.stderr)


def call(script: str, flags: list[str], seconds: float) -> tuple[int, str]:
    """Return (exit code, what it wrote to stderr) of a benchmark in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    return done.returncode, done.stderr


def call_here(script: str, flags: list[str]) -> tuple[int, str]:
    """Return the same of a benchmark in this process."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(script).main(flags)
    except (InputError, argparse.ArgumentError) as error:
        return 2, str(error)
    except Exception as error:
        return 1, f"{type(error).__name__}: {first_line(error)}"
    return 0, ""


def run_tests(seconds: float, *arguments: str) -> Tests:
    """Return what comes of pytest with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tests.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
        except subprocess.TimeoutExpired:
            return Tests(error=f"not done after {seconds:.0f} s")
        if not path.exists():
            return Tests(
                error=([line for line in done.stderr.splitlines() if line.strip()] or ["no report"])[-1][:300]
            )
        tests = Tests(failed={}, skipped={})
        for case in ElementTree.parse(path).iter("testcase"):
            wrong = [child for kind in ("failure", "error") for child in case.findall(kind)]
            left_out = case.find("skipped")
            if wrong:
                message = (wrong[0].get("message") or "").strip()
                tests.failed[f"{case.get('classname')}.{case.get('name')}"] = message.partition("\n")[0][:200]
            elif left_out is not None:
                reason = left_out.get("message") or ""
                tests.skipped[reason] = tests.skipped.get(reason, 0) + 1
            else:
                tests.passed += 1
        if tests.failed:
            print(done.stdout, file=sys.stderr)
        return tests


# --------------------------------------------------------------------------------------------------------------------
# The page


def targets(parts: list[Part]) -> list[Target]:
    """Return what was hoped for, with what was measured."""
    steps = [part.result for part in parts if part.script == "train_step" and part.result]

    def of(shape: str, quantization: str) -> list[dict]:
        shape = (shape, SMALL[shape])
        return [row for row in steps if row["model"] in shape and row["quantization"] == quantization]

    off = [100 * abs(row["estimated_peak_gib"] / row["tensors_at_peak_gib"] - 1) for row in steps]
    flux = of("flux-dev", "none")
    least = {shape: [row["tensors_at_peak_gib"] for row in of(shape, "nf4")] for shape in ("flux-dev", "qwen-image")}
    pairs = [STEPS_OF_A_PAIR * row["step_seconds"] for row in flux]
    shares = [100 * row["share_of_matmul_rate"] for row in flux]
    return [
        Target("the estimate of the peak, the furthest off of all rows", max(off, default=None), 15, "%"),
        Target("FLUX.1-dev in bf16: the steps of a pair", min(pairs, default=None), 60, "s"),
        Target("FLUX.1-dev in bf16: share of the matrix rate", max(shares, default=None), 60, "%", least=True),
        Target("FLUX.1-dev in nf4: peak", min(least["flux-dev"], default=None), 10, "GiB"),
        Target("Qwen-Image in nf4: peak", min(least["qwen-image"], default=None), 16, "GiB"),
    ]


def table(head: list[str], rows: list[list]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]


def rows_of(parts: list[Part], script: str, cells) -> list[list]:
    """Return a row for each of a script's parts: its flags and cells(result), or what went wrong."""
    rows = []
    for part in [part for part in parts if part.script == script]:
        wrong = "not run yet" if part.error is None else f"{'left out' if part.left_out else 'failed'}: {part.error}"
        values = cells(part.result) if part.result else [wrong]
        rows.append([f"`{part.flags}`", *values])
    width = max(map(len, rows), default=0)
    return [row + [""] * (width - len(row)) for row in rows]


def step_cells(row: dict) -> list[str]:
    """Return the cells of a training step."""
    peak, estimated = row["tensors_at_peak_gib"], row["estimated_peak_gib"]
    rates = f"{row['model_tflop_per_second']:.3g} of {row['matmul_tflop_per_second']:.3g} TFLOP/s"
    return [
        decimals(row, "step_seconds"),
        f"{rates}, {100 * row['share_of_matmul_rate']:.0f} %",
        f"{peak:.3g}",
        f"{estimated:.3g} ({100 * (estimated / peak - 1):+.1f} %)",
        f"{STEPS_OF_A_PAIR * row['step_seconds'] / 60:.2f}",
    ]


def infer_cells(row: dict) -> list[str]:
    """Return the cells of ten steps of inference."""
    times = [decimals(row, name) for name in ("base_seconds", "glance_to_base", "fused_to_base")]
    return [*times, f"{100 * row['share_of_matmul_rate']:.0f} %", f"{row['peak_memory_gib']:.3g}"]


def against_cells(row: dict) -> list[str]:
    """Return the cells of a step beside diffusers' own."""
    ratios = ("pipeline_to_bare", "dry_to_bare", "glance_to_example", "glance_to_example_cached")
    return [decimals(row, name) for name in ("glance_seconds", *ratios)]


def decimals(row: dict, name: str) -> str:
    """Return a result's number with three decimals, nothing where it was not measured."""
    return f"{row[name]:.3f}" if name in row else ""


def page(card: str, command: str, parts: list[Part], tests: Tests | None, small: bool) -> str:
    """Return the page: targets, training, inference, tests, and what it was measured with."""
    note = ["It is a trial of the script with tiny shapes: nothing here says anything of a card.", ""] if small else []
    goals = [
        [goal.name, f"at {'least' if goal.least else 'most'} {goal.limit:g} {goal.unit}", goal.shown(), goal.verdict()]
        for goal in targets(parts)
    ]
    steps = ["`train_step.py`", "seconds", "matrix products", "peak GiB", "estimated GiB", "a pair's steps, minutes"]
    infer = ["`infer.py`", "ten base steps, s", "Glance / base", "fused / base", "matrix products", "peak GiB"]
    against = ["`against_diffusers.py`", "a step, s", "pipeline / bare", "around / bare", "/ example", "/ cached"]
    lines = [
        *(
            f"# {card}, measured",
            "",
            f"Written by `{command}`, {datetime.date.today()}. Random weights of each shape,",
        ),
        *(f"batch 1; a pair is {STEPS_OF_A_PAIR} steps, loading and encoding apart.", "", *note),
        *(*table(["target", "", "measured", ""], goals), "", "## Training", ""),
        *(*table(steps, rows_of(parts, "train_step", step_cells)), "", "## Inference", ""),
        *(*table(infer, rows_of(parts, "infer", infer_cells)), "", "## Beside diffusers' own example", ""),
        *(*table(against, rows_of(parts, "against_diffusers", against_cells)), "", "## Tests marked `gpu`", ""),
        *(*test_lines(tests), "", "## With", "", *table(["", ""], list(machine().items())), ""),
    ]
    return "\n".join(lines)


def test_lines(tests: Tests | None) -> list[str]:
    """Return what came of the tests, as lines."""
    if tests is None:
        return ["not run"]
    if tests.error:
        return [f"failed: {tests.error}"]
    skipped = [f"- skipped, {count}: {reason}" for reason, count in tests.skipped.items()]
    return [f"{tests.passed} passed, {len(tests.failed)} failed", ""] + [
        *(f"- failed: {name}: {message}" for name, message in tests.failed.items()),
        *skipped,
    ]


def machine() -> dict[str, str]:
    """Return what it was measured with: versions, card, driver, commit."""

    def said_by(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    facts = {name: importlib.metadata.version(name) for name in LIBRARIES}
    facts |= {"Python": platform.python_version(), "CUDA": torch.version.cuda or "none"}
    facts["cards"] = said_by("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    facts["commit"] = said_by("git", "describe", "--always", "--dirty")
    return {name: " / ".join(value.splitlines()) or "unknown" for name, value in facts.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure, write the page, and return the exit code."""
    parser = cli.Parser(description="Measure a GPU: tests, then benchmarks at full shapes, on one page.")
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU, in this process; no tests")
    parser.add_argument("--only", default="", help="the parts whose command matches this regular expression")
    parser.add_argument("--no_tests", action="store_true", help="leave the tests marked gpu out")
    parser.add_argument("--minutes", type=cli.positive(float), default=10.0, help="what begins after them is left out")
    parser.add_argument("--output", help="the page's folder; docs/measured, with --small output/measured")
    args = parser.parse(argv)
    if not args.small and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; --small tries the script on the CPU")
    card = "CPU" if args.small else torch.cuda.get_device_name()
    folder = Path(args.output or ROOT / ("output/measured" if args.small else "docs/measured"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.md"
    words = [f"--only '{args.only}'"] if args.only else []
    words += [f"--{name}" for name in ("small", "no_tests") if getattr(args, name)]
    command = " ".join(["python benchmarks/gpu.py", *words])
    ends = time.monotonic() + 60 * args.minutes
    parts, tests = parts_of(args.small, args.only), None
    if not args.small and not args.no_tests:
        tests = run_tests(0.6 * 60 * args.minutes, "-m", "gpu", "-n", "4", "tests")
    for part in parts:
        left = ends - time.monotonic()
        if left > 0:
            run(part, left, here=args.small)
        else:
            part.error = f"the {args.minutes:g} minutes were over"
        path.write_text(page(card, command, parts, tests, args.small))
        print(f"{part.command}: {part.error or 'done'}", flush=True)
    path.write_text(page(card, command, parts, tests, args.small))
    print(path)
    failed = [part for part in parts if part.error and not part.left_out]
    return int(bool(failed or tests and (tests.error or tests.failed)))


if __name__ == "__main__":
    cli.run(lambda: sys.exit(main()))
