"""Seconds and memory of importing a transformer of 24 layers, checked against PyTorch as always.

    python tests/importer/import_cost.py [--layers 24] [--width 1024]

Memory is the peak of the process above what it was before the import, with the module in memory, over the weights' bytes.
The goals: 30 s, and less than 3.
"""

from __future__ import annotations

import argparse
import resource
import sys
import threading
import time
from pathlib import Path

import torch

import tvmq
from tvmq.zoo.encoders import SEQUENCE, VOCABULARY, Encoder

SECONDS, TIMES = 30.0, 3.0


class Peak:
    """The most memory that the process holds while a block runs, in bytes above its beginning: looked at 100 times a second."""

    def __enter__(self) -> Peak:
        self.before = self.most = _resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.01):
            self.most = max(self.most, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> int:
    """Import once small, to load what is loaded once; then measure. Exit code 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 24), ("width", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    tvmq.import_model(torch.nn.Linear(2, 2), torch.ones(1, 2))
    torch.manual_seed(0)
    width = options.width
    module = Encoder(options.layers, width, width // 64, 4 * width).eval()
    ids = torch.randint(0, VOCABULARY, (1, SEQUENCE))
    weights = sum(p.nbytes for p in module.parameters())
    with Peak() as peak:
        start = time.perf_counter()
        tvmq.import_model(module, ids)
        seconds = time.perf_counter() - start
    times = (peak.most - peak.before) / weights
    print(f"{weights / 2**20:.0f} MiB of weights: {seconds:.1f} s, {times:.2f} times the weights")
    return int(seconds > SECONDS or times > TIMES)


if __name__ == "__main__":
    sys.exit(main())
