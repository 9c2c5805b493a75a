"""The logs that tvmq ships: the models of the bench suite, tuned one after another into one log of a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvmq import zoo
from tvmq.importer.load import import_model
from tvmq.isa import Bf16
from tvmq.measure.peers import samples
from tvmq.measure.suite import MODELS, PRECISIONS, check_names
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision
from tvmq.target import Target, load_target
from tvmq.tune.progress import Summary
from tvmq.tune.run import tune
from tvmq.tune.tuner import Event

# Random inputs that calibrate: scales are no part of a task.
_CALIBRATION = 2


@dataclass(frozen=True)
class Run:
    """One model in one precision, and what tuning it came to."""

    model: str
    precision: str
    summary: Summary

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def tune_suite(
    target: str | Path | Target = "host",
    models: Sequence[str] = (),
    precisions: Sequence[str] = (),
    *,
    progress: Callable[[str], None] | None = None,
    event: Event = lambda _event: None,
    **options: Any,
) -> Iterator[Run]:
    """Tune each model in each precision that the target has instructions for; ends early where the user stops.

    models, precisions: none means the bench suite's. options: as of `tvmq.tune`; a budget is of each.
    Raises InputError for an unknown model or precision, and as `tvmq.tune` does.
    """
    models, precisions = models or MODELS, precisions or PRECISIONS
    check_names(models, precisions)
    spec = load_target(target)
    for name in models:
        module, example = zoo.builder(name)()
        model = import_model(module, example, check=False, name=name)
        for precision in precisions:
            if precision == Precision.BF16.value and spec.isa.bf16 is Bf16.NONE:
                continue
            if progress is not None:
                progress(f"{name} {precision}")
            recipe = Recipe(precision=Precision(precision))
            data = samples(example, _CALIBRATION) if recipe.precision in (Precision.INT8, Precision.AUTO) else None
            summary = tune(model, spec, recipe, data, event=event, **options)
            yield Run(name, precision, summary)
            if summary.interrupted:
                return
