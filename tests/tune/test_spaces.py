"""Spaces hold their defaults and only what templates can write; tasks forget numbers, not shapes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, conv, floats, grouped, integers, matmul, module_of, requantize, runnable, target_of, weights
from test_attention import attention
from tvm.s_tir import meta_schedule as ms

from tvmq import ops
from tvmq.kernels import decision as decisions
from tvmq.kernels.decision import DEFAULT, NEAR, TUNED, Decision, choose, decision_of
from tvmq.kernels.lower import lower
from tvmq.kernels.task import Task, task_of_json
from tvmq.kernels.task import module_of as module_of_task
from tvmq.tune import features
from tvmq.tune.candidate import Forced
from tvmq.tune.workload import decision_of_trace, line_of, record_of, task_text, workload_of

LEVELS = ("sse2", "avx2", "avx512-vnni", "amx", "raspberry-pi-4b", "raspberry-pi-5")


def some_cases(dtype: str = "uint8"):
    return [
        conv("float", floats((1, 14, 14, 32)), floats((64, 3, 3, 32)), padding=(1, 1, 1, 1)),
        conv("strided", integers((2, 15, 15, 24), dtype), weights((40, 3, 3, 24)), strides=(2, 2), zero_point=4),
        conv("grouped", integers((1, 9, 9, 32), dtype), weights((32, 3, 3, 8)), groups=4, zero_point=4),
        conv("stem", floats((1, 20, 20, 3)), floats((16, 7, 7, 3)), strides=(2, 2), padding=(3, 3, 3, 3)),
        matmul("rows", integers((1, 33, 30), dtype), weights((30, 50)), zero_point=9),
        matmul("vector", floats((1, 100)), floats((100, 10))),
    ]


def of_every_template(dtype: str = "uint8"):
    """Also those that only their own tests compile in all ways."""
    return [
        *some_cases(dtype),
        conv("depthwise", integers((1, 9, 9, 32), dtype), weights((32, 3, 3, 1)), groups=32, padding=(1, 1, 1, 1)),
        conv("float_depthwise", floats((1, 9, 9, 8)), floats((8, 5, 5, 1)), groups=8),
        grouped("int4", 4, (5, 64), 40, 32),
        grouped("int8", 8, (1, 3, 64), 40, 64, (ops.Bias(),)),
        attention(*(floats((1, 20, 2, 8), seed) for seed in range(3))),
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_the_default_is_a_point_and_is_what_lowering_takes(level):
    target = target_of(level)
    cases = of_every_template(target.isa.activation_dtype)
    choices = lower(module_of(cases), target).choices
    assert len(choices) == len(cases)
    for choice in choices.values():
        assert choice.source == DEFAULT
        assert choice.point in choice.space.points()
        for space in choice.spaces:
            points = space.points()
            assert len(set(points)) == len(points)
            assert all(len(point) == len(space.knobs) for point in points)
            assert all(np.isfinite(space.cost(point)) and space.cost(point) > 0 for point in points[::50])


@pytest.mark.parametrize("level", ["avx2", "avx512-vnni"])
@pytest.mark.parametrize("seed", range(3))
def test_any_point_computes_the_same(level, seed):
    target, rng = runnable(level), np.random.default_rng(seed)
    for case in some_cases():
        (choice,) = lower(module_of([case]), target).choices.values()
        space = choice.spaces[int(rng.integers(len(choice.spaces)))]
        points = space.points()
        wanted = decision_of(space, points[int(rng.integers(len(points)))])
        lowered = lower(module_of([case]), target, records=Forced(wanted))
        assert lowered.choices[case.name].decision == wanted
        check([case], target, records=Forced(wanted))


def test_numbers_do_not_make_another_task_but_structure_does():
    target = target_of("avx512-vnni")
    x, w = integers((1, 8, 8, 16), "uint8"), weights((32, 3, 3, 16))

    def task(**change) -> Task:
        zero_point = change.pop("zero_point", 5)
        epilogue = change.pop("epilogue", requantize(32, 144, "uint8", seed=change.pop("seed", 3)))
        case = conv("c", x, change.pop("w", w), zero_point=zero_point, epilogue=epilogue, out_dtype="uint8", **change)
        (choice,) = lower(module_of([case]), target).choices.values()
        return choice.task

    assert task() == task(zero_point=77) == task(seed=9) == task(w=weights((32, 3, 3, 16), 8))
    assert task() != task(zero_point=0)
    assert task() != task(padding=(1, 1, 1, 1))
    assert task() != task(epilogue=requantize(32, 144, "uint8", bias=False))


def test_a_task_is_its_json_and_an_operator_again():
    target = target_of("avx512-vnni")
    for choice in lower(module_of(of_every_template()), target).choices.values():
        assert task_of_json(choice.task.to_json()) == choice.task
        again = lower(module_of_task(choice.task), target).choices["y"]
        assert (again.task, again.decision) == (choice.task, choice.decision)


@pytest.mark.parametrize("level", ["avx512-vnni", "raspberry-pi-4b"])
def test_every_task_has_a_workload_that_names_it(level):
    target = target_of(level)
    for choice in lower(module_of(of_every_template(target.isa.activation_dtype)), target).choices.values():
        workload = ms.database.Workload(workload_of(choice.task))
        _, encoded = line_of(workload)
        assert task_of_json(task_text(encoded)) == choice.task
        record = record_of(workload, choice.spaces, choice.decision, "default", [1e-3], target)
        assert decision_of_trace(record.as_json()[0]) == (choice.decision, "default")
        assert len(features.rows_of(choice.task, choice.space, [choice.point], 1.0)) == 1


def test_families_have_any_size():
    target = target_of("avx512-vnni")

    def task(size: int, channels: int = 32) -> Task:
        case = conv("c", floats((1, size, size, 16)), floats((channels, 3, 3, 16)), padding=(1, 1, 1, 1))
        return lower(module_of([case]), target).choices["c"].task

    assert task(14) != task(28)
    assert task(14).family() == task(28).family()
    assert task(14).family() != task(14, 48).family()


# --- what records say -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Told:
    answers: list

    def decisions(self, _task):
        return self.answers


def a_choice():
    case = conv("c", integers((1, 14, 14, 32), "uint8"), weights((64, 3, 3, 32)), zero_point=1)
    return lower(module_of([case]), target_of("avx512-vnni")).choices["c"]


def test_the_first_legal_decision_is_taken():
    plain = a_choice()
    other = decision_of(plain.space, plain.space.points()[0])
    illegal = Decision("gemm", tuple((name, 99) for name in plain.space.knobs))
    unknown = Decision("magic", (("m", 1),))
    chosen = choose(plain.task, plain.spaces, Told([(unknown, TUNED), (illegal, TUNED), (other, TUNED)]))
    assert (chosen.decision, chosen.source) == (other, TUNED)
    assert choose(plain.task, plain.spaces, Told([(illegal, TUNED)])).source == DEFAULT
    assert choose(plain.task, plain.spaces, None).decision == plain.decision


def test_a_near_match_keeps_the_tile_and_must_not_look_worse(monkeypatch):
    plain = a_choice()
    rows, columns, vectors, *_ = plain.point
    elsewhere = decision_of(plain.space, (rows, columns, vectors, 99, 0, 0))
    near = choose(plain.task, plain.spaces, Told([(elsewhere, NEAR)]))
    assert near.source == NEAR
    assert near.point == plain.point
    slow = decision_of(plain.space, (1, 1, 1, 1, 0, 0))
    assert choose(plain.task, plain.spaces, Told([(slow, NEAR)])).source == DEFAULT
    monkeypatch.setattr(decisions, "_TRUST", 1e9)
    assert choose(plain.task, plain.spaces, Told([(slow, NEAR)])).source == NEAR


def test_weights_that_winograd_is_too_inexact_for_fall_back(monkeypatch):
    from tvmq.kernels import lower_winograd

    case = conv("c", floats((1, 56, 56, 64)), floats((64, 3, 3, 64)), padding=(1, 1, 1, 1))
    target = target_of("avx512-vnni")
    plain = lower(module_of([case]), target).choices["c"]
    assert plain.space.template == "winograd"
    monkeypatch.setattr(lower_winograd, "TOLERANCE", 1e-12)
    lowered = lower(module_of([case]), target, records=Forced(plain.decision))
    assert lowered.choices["c"].space.template == "gemm"
    assert "off by" in lowered.notes["c"]


def test_residuals_and_clips_are_numbers_too():
    target = target_of("avx512-vnni")

    def task(scale: float, high: float) -> Task:
        epilogue = ([], (ops.Residual(scale, 3), ops.Clip(0.0, high)))
        case = conv(
            "c",
            floats((1, 8, 8, 16)),
            floats((32, 1, 1, 16)),
            epilogue=epilogue,
            extra=(integers((1, 8, 8, 32), "uint8"),),
        )
        return lower(module_of([case]), target).choices["c"].task

    assert task(0.5, 6.0) == task(0.25, 3.0)
