"""What a monitor knows: numbers of named rows, step by step and overall, on the host."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

# Columns of each part of a report; NaN where a number is not known.
STATISTICS = (
    "count",  # finite values
    "mean",
    "std",
    "skewness",
    "kurtosis",
    "min",
    "max",
    "amax",
    "l1",
    "l2",
    "mean_abs",
    "zeros",  # share
    "negatives",  # share
    "nan",  # number
    "inf",  # number, of either sign
)
COLUMNS = {
    "activations": (
        *STATISTICS,
        "dead",  # share of units whose outputs were all zero
        "saturated",  # share of outputs of a sigmoid or tanh within 1/16 of its limits
        "diversity",  # variance between units over variance of all values, 0: units are alike
    ),
    "gradients": STATISTICS,
    "weights": STATISTICS,
    "updates": (
        "grad_norm",
        "weight_norm",
        "update_norm",
        "ratio",  # update_norm / weight_norm
        "moved",  # share of elements that changed
        "stuck",  # share of elements that did not, though their gradient is not zero
    ),
}


@dataclass(frozen=True)
class Part:
    """Numbers of named rows: one of :data:`COLUMNS`."""

    names: list[str]
    by_step: dict[str, Tensor]  # column: float64 [steps, rows]
    overall: dict[str, Tensor]  # column: float64 [rows], over all steps of the report
    histogram: Tensor | None = None  # int64 [rows, NUM_BUCKETS], since the monitor was attached


@dataclass(frozen=True)
class Report:
    """Everything that a monitor has to say; tensors are on the CPU."""

    steps: list[int]  # training steps that were monitored and are kept, in order
    parts: dict[str, Part] = field(default_factory=dict)  # those of COLUMNS that are monitored
    num_bytes: int = 0  # memory of the monitor, host and devices
