"""``python -m fastremedy demo``, ``imbalance``, ``distributed``, ``info`` and ``bench``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train a network twice, with stock PyTorch and with fastremedy, and compare",
    "imbalance": "train on a rare class with and without focal loss, and compare recall",
    "distributed": "train on several processes started by torchrun, and compare with one",
    "info": "print what a bug report needs: versions, devices, backends",
    "bench": "measure the operators against stock PyTorch on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastremedy")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    arguments = sys.argv[1:] if argv is None else list(argv)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if arguments[:1] == [name]:  # a command is imported when it runs: the others cost nothing
            importlib.import_module(f".{name}", __package__).add_arguments(command)
    options = parser.parse_args(arguments)
    status: int = importlib.import_module(f".{options.command}", __package__).run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
