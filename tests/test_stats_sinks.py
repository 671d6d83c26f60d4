"""What a monitor reports, as a table and as JSON lines."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
import torch

from fastremedy.ops.activation_stats import histogram_of
from fastremedy.stats import jsonlines, table
from fastremedy.stats.layers import Layers, title
from fastremedy.stats.report import Part, Report

from .stats_reports import ODD_NAMES, POOR_REPORTS, STEPS, make_part, make_report, plant


@pytest.fixture(params=POOR_REPORTS)
def poor_report(request: pytest.FixtureRequest) -> Report:
    return POOR_REPORTS[request.param]


def test_layers_are_in_model_order() -> None:
    parts = {
        "activations": make_part("activations", ["", "conv", "relu", "fc", "softmax"]),
        "gradients": make_part("gradients", ["scale", "conv.weight", "bn.weight", "fc.bias"]),
        "updates": make_part("updates", ["stem.weight", "bn.weight", "bn.bias", "last.weight"]),
    }
    order = ["stem", "", "conv", "bn", "last", "relu", "fc", "softmax"]
    assert Layers(Report(STEPS, parts)).names == order


def test_titles_stand_on_one_line() -> None:
    titles = [title(name) for name in ODD_NAMES]
    assert titles[:5] == ["(model)", "a b", "x$^{", "[bold]", "ünï"]
    assert titles[5] == r"new\nline"
    assert titles[-1] == r"\x1b[31m"
    assert title("\ud800") == r"\ud800"


# Table


@pytest.fixture(params=["rich", "plain"])
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich", None)
    else:
        pytest.importorskip("rich")


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line.split() for line in text.splitlines()]
    return {words[0]: words[1:] for words in lines if words}


def test_table_of_healthy_layers(drawn: None) -> None:
    text = table.render(make_report())
    row = ["0.25", "1.5", "6", "50.0%", "12.5%", "4.24", "no", "5.66", "0.001", "0"]
    for i in range(3):
        assert rows_of(text)[f"blocks.{i}.fc"] == row
    headings = "layer mean std |max| zeros dead grad norm vanishing weight norm update ratio stuck"
    assert sorted(re.findall(r"[a-z|]+", text.split("blocks")[0])) == sorted(headings.split())
    assert "saturated" not in text
    assert "NaN" not in text
    assert "!" not in text
    assert "\x1b" not in text
    assert "steps 0 to 20, 3 monitored; monitor holds 1.2 MiB for 3 layers" in text


SICK: list[tuple[str, str, int, dict[str, float], str]] = [
    ("dead", "activations", 1, {"dead": 0.75}, "!75.0%"),
    ("saturated", "activations", 1, {"saturated": 0.9}, "!90.0%"),
    ("NaN/inf", "gradients", 3, {"nan": 2.0, "inf": 5.0}, "!7"),
    ("update ratio", "updates", 2, {"update_norm": 8.0}, "!1.41"),
    ("update ratio", "updates", 2, {"update_norm": 0.0, "weight_norm": 1000.0}, "!4e-06"),
    ("stuck", "updates", 3, {"stuck": 0.75}, "!75.0%"),
]


@pytest.mark.parametrize(("ailment", "kind", "row", "numbers", "cell"), SICK)
def test_table_tells_what_is_sick(
    drawn: None, ailment: str, kind: str, row: int, numbers: dict[str, float], cell: str
) -> None:
    report = make_report()
    plant(report, kind, row, **numbers)
    text = table.render(report)
    assert cell in rows_of(text)["blocks.1.fc"]
    assert text.count("!") == 2
    assert f"! {ailment}, 1 layer: blocks.1.fc (" in text


def test_vanishing_is_the_mean_of_all_parameters_of_a_layer(drawn: None) -> None:
    report = make_report()
    for row, size in ((0, 1e-8), (1, 1e-5), (2, 1e-8), (3, 1e-8), (4, 0.0), (5, 0.0)):
        plant(report, "gradients", row, l1=size * 64)
    text = table.render(report)
    assert "no" in rows_of(text)["blocks.0.fc"]
    assert "!1.0e-08" in rows_of(text)["blocks.1.fc"]
    assert "!0.0e+00" in rows_of(text)["blocks.2.fc"]
    assert "! vanishing, 2 layers: blocks.1.fc, blocks.2.fc (" in text


def test_norms_are_medians_of_what_is_known(drawn: None) -> None:
    report = make_report(1)
    steps = torch.tensor([[math.nan, math.nan], [3.0, 4.0], [math.nan, 7.0]]).double()
    report.parts["gradients"].by_step["l2"][:] = steps
    report.parts["updates"].by_step["grad_norm"][:] = torch.nan
    assert rows_of(table.render(report))["blocks.0.fc"][5] == "5"
    del report.parts["gradients"]
    report.parts["updates"].by_step["grad_norm"][:] = torch.tensor([6.0, 8.0])
    assert rows_of(table.render(report))["blocks.0.fc"][5] == "10"


def test_table_of_little(drawn: None, poor_report: Report) -> None:
    text = table.render(poor_report)
    for name in Layers(poor_report).names:
        assert any(line.startswith(title(name)) for line in text.splitlines())
    assert text.splitlines()[-1].startswith(table.covered(poor_report))
    assert "nan" not in text.lower().replace("nan/inf", "")


def test_many_layers_are_all_there_and_the_sick_are_counted(drawn: None) -> None:
    report = make_report(200)
    for row in range(60, 90):
        plant(report, "activations", row, dead=1.0)
    text = table.render(report)
    assert set(rows_of(text)) >= {f"blocks.{i}.fc" for i in range(200)}
    examples = ", ".join(f"blocks.{i}.fc" for i in range(60, 64))
    assert f"! dead, 30 layers: {examples}, ... (more than" in text


def test_nothing_is_cut_off_in_files(drawn: None) -> None:
    name = "encoder." * 60 + "fc"
    report = Report(STEPS, {"activations": make_part("activations", [name], mean=1.0, std=2.0)})
    assert rows_of(table.render(report))[name] == ["1", "2"]


def test_colour_and_folded_names_in_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    for name, value in {"COLUMNS": "40", "TERM": "xterm", "NO_COLOR": ""}.items():
        monkeypatch.setenv(name, value)
    report = make_report()
    report.parts["activations"].names[0] = "encoder." * 10
    plant(report, "activations", 0, dead=1.0)
    text = table.render(report, color=True)
    assert re.search(r"\x1b\[1;31m *!100\.0%", text)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert "encoder.encoder.encoder.encoder" not in plain.split("\n!")[0]
    for number in ("0.25", "4.24", "0.001", "stuck"):
        assert number in plain


# JSON lines


def test_lines_read_back() -> None:
    report = make_report()
    for column in report.parts["activations"].by_step.values():
        column += torch.arange(3)[:, None] / 3
    read = [json.loads(line) for line in jsonlines.lines(report)]
    assert [line["step"] for line in read] == STEPS
    for i, line in enumerate(read):
        assert list(line) == ["step", *report.parts]
        for kind, part in report.parts.items():
            assert list(line[kind]) == part.names
            for row, name in enumerate(part.names):
                for column, values in part.by_step.items():
                    number, written = values[i, row].item(), line[kind][name][column]
                    if math.isnan(number):
                        assert written is None
                    elif column in jsonlines.INTEGERS:
                        assert written == int(number)
                    else:
                        assert written == pytest.approx(number, rel=5e-7, abs=0)


def test_lines_after_a_step() -> None:
    report = make_report()
    lines = list(jsonlines.lines(report))
    assert list(jsonlines.lines(report, after_step=0)) == lines[1:]
    assert list(jsonlines.lines(report, after_step=15)) == lines[2:]
    assert list(jsonlines.lines(report, after_step=20)) == []


def test_lines_are_valid_json(poor_report: Report) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = list(jsonlines.lines(poor_report))
    assert len(lines) == len(poor_report.steps)
    for line in lines:
        assert "\n" not in line
        read = json.loads(line, parse_constant=refuse)
        for kind, part in poor_report.parts.items():
            assert list(read[kind]) == part.names


def test_numbers_are_short() -> None:
    """7 digits, as float32 has; integers have all of theirs."""
    values = [1 / 3, -2e-30 / 7, 123456789.4, 2.0**40, 1e30 / 3, 0.0]
    given = torch.tensor([values], dtype=torch.float64)
    columns = {"mean": given, "count": torch.full_like(given, 2**33 + 1)}
    part = Part([str(i) for i in range(len(values))], columns, {})
    (text,) = jsonlines.lines(Report([7], {"activations": part}))
    rows = json.loads(text)["activations"]
    for i, value in enumerate(values):
        assert rows[str(i)]["count"] == 2**33 + 1
        assert rows[str(i)]["mean"] == pytest.approx(value, rel=5e-7)
    assert rows["3"]["mean"] == 2**40
    assert "0.3333333," in text
    assert "123456800.0," in text


def test_counts_are_integers() -> None:
    line = json.loads(next(jsonlines.lines(make_report())))
    count = line["activations"]["blocks.0.fc"]["count"]
    assert (count, type(count)) == (640, int)


def test_dictionary() -> None:
    report = make_report()
    result = jsonlines.as_dict(report)
    assert result["steps"] == STEPS
    assert result["num_bytes"] == 1258291
    row = result["activations"]["blocks.1.fc"]
    assert (row["mean"], row["count"], row["dead"]) == (0.25, 640, 0.125)
    assert math.isnan(row["saturated"])
    assert "quantiles" not in row
    assert {type(number) for row in result["updates"].values() for number in row.values()} == {
        float
    }


def test_dictionary_of_little(poor_report: Report) -> None:
    result = jsonlines.as_dict(poor_report)
    assert list(result) == ["steps", "num_bytes", *poor_report.parts]


def test_quantiles() -> None:
    x = torch.randn(2, 10000, generator=torch.Generator().manual_seed(0)) + 3
    part = make_part("weights", ["a", "b"], histogram=histogram_of(x))
    result = jsonlines.as_dict(Report(STEPS, {"weights": part}))
    for row, values in zip("ab", x, strict=True):
        for q, value in result["weights"][row]["quantiles"].items():
            assert value == pytest.approx(values.quantile(q).item(), rel=0.0625)
