"""Print the committed results into README.md, between the two marks.

python benchmarks/table.py          write the tables
python benchmarks/table.py --check  fail if they are not what the results say
python benchmarks/table.py --path   print the result file of this machine
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- printed by benchmarks/table.py: begin -->"
END = "<!-- end -->"
OPERATIONS = {
    "activation_stats": "`Statistics`",
    "adamw": "clip + AdamW step",
    "batch_norm_relu": "`BatchNormReLU2d`",
    "clip_grad_norm": "`clip_`",
    "focal_loss": "focal loss",
}


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Print benchmark results into README.md.")
    parser.add_argument("--check", action="store_true", help="fail if README.md is out of date")
    parser.add_argument("--path", action="store_true", help="print this machine's result file")
    options = parser.parse_args()
    if options.path:
        from fastremedy import bench

        print(RESULTS.relative_to(ROOT) / f"{bench.machine()['name']}.json")
        return 0
    text = README.read_text()
    updated = replace_tables(text, tables(RESULTS))
    if options.check:
        if text != updated:
            print("README.md is out of date: run python benchmarks/table.py", file=sys.stderr)
        return int(text != updated)
    README.write_text(updated)
    return 0


def replace_tables(text: str, content: str) -> str:
    """Return ``text`` with ``content`` between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def tables(folder: Path) -> str:
    """Return the tables of all result files, and what has not been measured.

    Those of the first machine lie open: of names, GPUs come first, then wider vectors.
    """
    paths = sorted(folder.glob("*.json"), reverse=True)
    reports = [json.loads(path.read_text()) for path in paths]
    parts = [machine_tables(report) for report in reports[:1]] + list(map(folded, reports[1:]))
    if not reports:
        parts.append("Nothing has been measured yet.")
    elif not any(report["machine"]["gpu"] for report in reports):
        parts.append("No GPU has been measured yet.")
    return "\n\n".join(parts)


def folded(report: dict[str, Any]) -> str:
    """Return the tables of one result file, to be opened by a click."""
    summary = f"<summary>The same on {machine_of(report)}</summary>"
    return f"<details>\n{summary}\n\n{machine_tables(report)}\n\n</details>"


def machine_of(report: dict[str, Any]) -> str:
    """Return what measured."""
    machine = report["machine"]
    cpu = f"{machine['cpu']} ({machine['cpu_capability']}, {machine['threads']} threads)"
    return f"{machine['gpu']}, {cpu}" if machine["gpu"] else cpu


def machine_tables(report: dict[str, Any]) -> str:
    """Return the tables of one result file, under a line that says where they come from."""
    versions = report["versions"]
    names = ("fastremedy", "torch", "triton")
    what = ", ".join(f"{name} {versions[name]}" for name in names if versions[name])
    copies = ", ".join(f"{name} {gb:.0f} GB/s" for name, gb in report["copy_gb_per_s"].items())
    origin = f"commit {report['commit']}, {report['date']}, `{report['command']}`"
    origin = f"**{machine_of(report)}**: {what}, {origin}"
    parts = [f"{origin}. Copy bandwidth: {copies}. Median milliseconds."]
    by_table = itertools.groupby(sorted(report["results"], key=table_of), key=table_of)
    parts += [operation_table(key, list(records), report) for key, records in by_table]
    return "\n\n".join(parts)


def table_of(record: dict[str, Any]) -> tuple[str, str, str]:
    """Return what the records of one table have in common."""
    return record["device"], record["stem"], record["note"]


def operation_table(
    key: tuple[str, str, str], records: list[dict[str, Any]], report: dict[str, Any]
) -> str:
    """Return one table: a row for every size, a column for every candidate."""
    device, stem, note = key
    title = f"{OPERATIONS[stem]}{', ' if note else ''}{note} ({device})"
    candidates = list(records[0]["ms"])
    headings = [title, *candidates, "times faster", "GB/s"]
    rows = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for record in records:
        p50 = [record["ms"][name]["p50"] for name in candidates]
        ratio = f"**{digits(p50[1] / p50[0])}**"
        rows.append([size(record), *map(digits, p50), ratio, bandwidth(record, report)])
    if not any(row[-1] for row in rows[2:]):
        rows = [row[:-1] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def digits(value: float) -> str:
    """Return three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def size(record: dict[str, Any]) -> str:
    """Return a case as ``1000 x 64``."""
    return str(record["case"]).replace("x", " x ").replace("-", ", ")


def bandwidth(record: dict[str, Any], report: dict[str, Any]) -> str:
    """Return our bytes per second, and their share of a copy's, where memory is the limit."""
    if record["bytes_per_element"] is None or record["elements"] < 2**24:
        return ""
    ours = next(iter(record["ms"].values()))
    gb_per_s = record["bytes_per_element"] * record["elements"] / ours["p50"] / 1e6
    return f"{gb_per_s:.0f} ({gb_per_s / report['copy_gb_per_s'][record['device']]:.0%} of a copy)"


if __name__ == "__main__":
    sys.exit(main())
