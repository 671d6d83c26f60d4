"""Statistics of tensors in one read, and the monitor that shows what every layer does."""

from .monitor import Monitor
from .report import Part, Report
from .statistics import Statistics, Summary

__all__ = ["Monitor", "Part", "Report", "Statistics", "Summary"]
