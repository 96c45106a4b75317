"""Check the model of whole steps that `rarefy plan --budget` goes by, on networks that it was not fitted to.

    python tools/check_steps.py
    OMP_NUM_THREADS=1 python tools/check_steps.py --rounds 9

Takes the calibrations of this machine, or makes them, which needs some minutes; then times whole steps of the networks
of rarefy.foresight.timing.HELD_OUT in turn, in every precision that the planner may choose here, and prints each beside
what was predicted. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace

import torch

from rarefy.cost import cost_model
from rarefy.foresight import Shape, StepModel, step_model
from rarefy.foresight.law import block_name
from rarefy.foresight.steps import TimedStep
from rarefy.foresight.timing import HELD_OUT, step_precisions, time_steps
from rarefy.ops.memory import keep_freed
from rarefy.training.machine import machine


def row(model: StepModel, step: TimedStep) -> tuple[str, float]:
    """A line of the table, and the relative error of the prediction."""
    shape, predicted = step.shape, model.of(step.shape, step.linears)
    error = predicted / step.ms - 1
    cells = (
        f"{shape.width}, {shape.layers}, {shape.attended}, {shape.context}, {shape.batch}", structure(shape),
        shape.precision, f"{predicted:.1f}", f"{step.ms:.1f}", f"{error:+.0%}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |", error


def structure(shape: Shape) -> str:
    """Dense, or density and units."""
    if shape.dense:
        return "dense"
    return f"{shape.density:.0%}" + ("" if shape.block == (1, 1) else f", {block_name(shape.block)}")


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each network that are timed, in turn")
    asked = parser.parse_args()
    keep_freed()

    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    costs = cost_model(progress=progress)
    model = step_model(costs, progress=progress)
    about = machine()
    print(f"{about['cpu']}, {about['isa']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"on its own points: median error {model.fitted['median_error']:.1%}, worst {model.fitted['worst_error']:.0%}\n"
    )
    print("| width, layers, attention, context, windows | structure | precision | predicted | measured | error |")
    print("|---|---|---|---|---|---|")
    errors = []
    for precision in step_precisions():
        shapes = [replace(shape, precision=precision) for shape in HELD_OUT]
        for step in time_steps(shapes, costs, rounds=asked.rounds, progress=progress):
            line, error = row(model, step)
            print(line)
            errors.append(abs(error))
    print(f"\nmedian error {statistics.median(errors):.1%}, worst {max(errors):.0%}")


if __name__ == "__main__":
    main()
