"""Which way a small step takes is what earlier ones took less time for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .conftest import CSRC

# Prints how often each way is taken, if they take so long; at first after a change, 10 times that.
PROGRAM = """
#include <cstdio>
#include <cstdlib>

#include "host/quicker_way.h"

int main(int, char** argv) {
  const double seconds[2] = {atof(argv[1]), atof(argv[2])};
  const int num_times = atoi(argv[3]);
  fastremedy::host::QuickerWay way;
  int taken[2] = {0, 0};
  bool last = false;
  for (int i = 0; i < num_times; ++i) {
    const bool is_second = way.is_second();
    ++taken[is_second];
    way.note((is_second == last ? 1 : 10) * seconds[is_second]);
    last = is_second;
  }
  std::printf("%d %d", taken[0], taken[1]);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quicker_way")
    (folder / "main.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", f"-I{CSRC}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "main"


def times_taken(program: Path, first: float, second: float, num_times: int) -> list[int]:
    command = [str(program), str(first), str(second), str(num_times)]
    return [int(n) for n in subprocess.run(command, capture_output=True, text=True).stdout.split()]


def test_the_quicker_way_is_taken(program: Path) -> None:
    assert times_taken(program, 1.0, 1.1, 1024) == [1016, 8]
    assert times_taken(program, 1.1, 1.0, 1024) == [8, 1016]
    assert times_taken(program, 1.0, 1.0, 1024) == [1016, 8]


def test_both_ways_are_tried_again(program: Path) -> None:
    assert times_taken(program, 1.1, 1.0, 2048) == [16, 2032]
    assert times_taken(program, 1.0, 1.1, 2048) == [2032, 16]
