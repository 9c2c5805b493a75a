"""What compiling costs: seconds and peak memory of each model, in a process of its own.

`python -m tvmq.measure.compile_cost MODEL PRECISION TARGET` is such a process: it prints the row as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvmq.detect import detect_host
from tvmq.errors import CheckFailed
from tvmq.measure.report import figure, table
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision
from tvmq.target import load_target
from tvmq.zoo import builder

Progress = Callable[[str], None]
MODELS = ("resnet18", "resnet50", "resnet152")
PRECISIONS = ("int8",)
# Random inputs that calibrate.
_CALIBRATION = 8


@dataclass(frozen=True)
class Cost:
    """One model: operators (convolutions and the like, as `tvmq explain` lists them), seconds, MiB.

    import_s: torch.export, and the comparison with PyTorch. compile_s: all stages of `compile`, by name in stages_s.
    peak_mib: the largest resident memory of the process, PyTorch and TVM included.
    """

    model: str
    precision: str
    operators: int
    import_s: float
    compile_s: float
    peak_mib: float
    stages_s: dict[str, float]


@dataclass(frozen=True)
class CompileCost:
    """All models, and what they were compiled on and for."""

    processor: str
    cores: int
    target: str
    rows: list[Cost]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """One row a model; the last column shows whether time grows faster than the model."""
        machine = f"{self.cores} cores of {self.processor}"
        head = f"Untuned, for {self.target}, on {machine}; {_CALIBRATION} calibration inputs\n"
        columns = ("model", "precision", "operators", "import s", "compile s", "peak MiB", "ms / operator", "stages s")
        cells = (
            (
                row.model,
                row.precision,
                row.operators,
                figure(row.import_s, 1),
                figure(row.compile_s, 1),
                figure(row.peak_mib, 0),
                figure(1e3 * (row.import_s + row.compile_s) / row.operators, 0),
                ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.stages_s.items() if seconds >= 0.1),
            )
            for row in self.rows
        )
        return f"{head}\n{table(columns, cells)}"


def run(
    models: Sequence[str] = MODELS,
    precisions: Sequence[str] = PRECISIONS,
    *,
    target: str = "host",
    progress: Progress | None = None,
) -> CompileCost:
    """Compile each model in each precision, one after another.

    Raises InputError for an unknown model, RecipeError for an unknown precision, TargetError, CheckFailed.
    """
    for name in models:
        builder(name)
    for precision in precisions:
        Recipe(precision=precision)  # type: ignore[arg-type]
    spec, host = load_target(target), detect_host()
    rows = []
    for name in models:
        for precision in precisions:
            if progress:
                progress(f"{name} {precision}")
            rows.append(_child(name, precision, target))
    return CompileCost(host.description, host.cores, spec.name, rows)


def _child(*words: str) -> Cost:
    """The row that a process of its own prints. Raises CheckFailed where it fails."""
    process = subprocess.run([sys.executable, "-m", __name__, *words], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        seen = lines[-1] if lines else f"exit code {process.returncode}"
        raise CheckFailed(f"compiling {' '.join(words)} in a process of its own", expected="a bundle", seen=seen)
    return Cost(**json.loads(process.stdout.strip().splitlines()[-1]))


def measure(name: str, precision: str, target: str) -> Cost:
    """Compile one model in this process."""
    from tvmq.files import scratch_folder
    from tvmq.importer.load import import_model
    from tvmq.measure.peers import samples
    from tvmq.pipeline import compile_model

    module, example = builder(name)()
    recipe = Recipe(precision=Precision(precision))
    data = samples(example, _CALIBRATION) if recipe.precision in (Precision.INT8, Precision.AUTO) else None
    clock = _Clock()
    clock.next("import")
    # Rounding adds up over 152 layers of random weights: float64 gives results that are 4e-4 of the largest apart.
    model = import_model(module, example, name=name, tolerance=1e-2)
    with scratch_folder() as folder:
        path = folder / "model.tvmq"
        made = compile_model(model, target, recipe, data, path, progress=lambda stage, _n: clock.next(stage))
    clock.next("")
    stages = clock.seconds
    import_s = stages.pop("import")
    # Kibibytes, on Linux. The linker is a process of its own, and smaller.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Cost(name, precision, len(made.operators), import_s, sum(stages.values()), peak, stages)


class _Clock:
    """Seconds of each stage; one begins where the one before ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def next(self, stage: str) -> None:
        """`stage` begins; naming the present one again changes nothing."""
        now = time.perf_counter()
        if stage == self._stage:
            return
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


if __name__ == "__main__":
    print(json.dumps(asdict(measure(*sys.argv[1:]))))
