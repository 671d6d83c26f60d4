"""Statistics of tensors in one read, which merge over steps, ranks and runs."""

from .statistics import Statistics, Summary

__all__ = ["Statistics", "Summary"]
