"""The Relax of each stage of the pipeline in a folder, for whoever wants to read it."""

from __future__ import annotations

from pathlib import Path

import tvm

from tvmq.files import atomic_write_text


class Dump:
    """Writes the Relax of each stage to a folder, in order; without a folder it only passes modules on."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.count = 0

    def __call__(self, stage: str, module: tvm.IRModule) -> tvm.IRModule:
        """`module`, which is written down as `stage`."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.folder / f"{self.count:02d}_{stage}.py", module.script(show_meta=False))
            self.count += 1
        return module
