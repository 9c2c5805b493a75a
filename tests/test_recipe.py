from pathlib import Path

import pytest

from tvmq.errors import RecipeError
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import KINDS, Aggregate, Observer, Precision


def _one_line(call, *parts: str) -> None:
    with pytest.raises(RecipeError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_strings_become_enums():
    recipe = Recipe(precision="int8", observer="percentile", rules=[{"match": "head.*", "precision": "fp32"}])
    assert recipe.precision is Precision.INT8
    assert recipe.observer is Observer.PERCENTILE
    assert recipe.rules == (Rule("head.*", Precision.FP32),)


def test_a_rule_made_of_strings_is_the_same_rule():
    assert Rule("a", "fp32").precision is Precision.FP32
    assert Recipe(precision="int8", rules=[Rule("a", "fp32")]).precision_of("conv2d", "a")[0] is Precision.FP32


def test_dict_round_trip():
    recipe = Recipe(
        precision="int8",
        observer="moving_average",
        percentile=99.0,
        momentum=0.3,
        fixed_range=3.0,
        activation_bits=7,
        weight_bits=4,
        power_of_two="weights",
        symmetric=True,
        symmetric_loss=0.5,
        narrow_range=True,
        per_channel=False,
        winograd=False,
        kinds=("conv2d", "add"),
        rules=(Rule("stem*", Precision.FP32),),
    )
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict({}) == Recipe()


def test_toml(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text(
        'precision = "int8"\npercentile = 99.9\nkinds = ["conv2d", "matmul"]\n'
        '[[rules]]\nmatch = "fc"\nprecision = "fp32"\n[[rules]]\nmatch = "*"\nprecision = "int8"\n'
    )
    recipe = Recipe.from_toml(path)
    assert recipe.kinds == ("conv2d", "matmul")
    assert recipe.precision_of("matmul", "fc") == (Precision.FP32, "rule 'fc'")


@pytest.mark.parametrize(
    ("rules", "kind", "names", "expected"),
    [
        ([], "conv2d", ["a"], ("int8", "the recipe's precision")),
        ([("layer1.*", "fp32")], "conv2d", ["layer1_conv", "layer1.conv"], ("fp32", "rule 'layer1.*'")),
        ([("layer1.*", "fp32")], "conv2d", ["layer10.conv"], ("int8", "the recipe's precision")),
        ([("conv2d", "fp32")], "conv2d", ["a"], ("fp32", "rule 'conv2d'")),
        ([("LAYER*", "fp32")], "conv2d", ["layer1"], ("int8", "the recipe's precision")),  # case matters
        ([("a", "int8"), ("*", "fp32")], "conv2d", ["a"], ("int8", "rule 'a'")),  # the first match wins
        ([("a", "int8"), ("*", "fp32")], "conv2d", ["b"], ("fp32", "rule '*'")),
    ],
)
def test_rules(rules, kind, names, expected):
    recipe = Recipe(precision="int8", rules=[{"match": m, "precision": p} for m, p in rules])
    precision, why = recipe.precision_of(kind, *names)
    assert (precision.value, why) == expected


def test_precisions_of_layers_that_read_floats_are_for_these():
    recipe = Recipe(precision="int4-weight", rules=[Rule("head", "fp32"), Rule("stem", "int8-dynamic")])
    assert recipe.precision_of("matmul", "a") == (Precision.INT4_WEIGHT, "the recipe's precision")
    assert recipe.precision_of("matmul", "head") == (Precision.FP32, "rule 'head'")
    assert recipe.precision_of("conv2d", "a") == (Precision.INT4_WEIGHT, "the recipe's precision")
    assert recipe.precision_of("conv2d", "stem") == (Precision.FP32, "int8-dynamic is for linear layers")
    assert recipe.precision_of("attention", "stem") == (Precision.INT8_DYNAMIC, "rule 'stem'")
    layers = "int4-weight is for convolutions and linear layers"
    assert recipe.precision_of("attention", "a") == (Precision.FP32, layers)
    without = Recipe(precision="int8-weight", kinds=("conv2d",))
    assert without.precision_of("matmul", "a") == (Precision.FP32, "the recipe's kinds leave out matmul")


def test_groups_are_of_32_inputs_for_4_bits_and_whole_channels_for_8_unless_asked():
    assert Recipe().weight_group(Precision.INT4_WEIGHT) == 32
    assert Recipe().weight_group(Precision.INT8_WEIGHT) is None
    assert Recipe(group_size=128).weight_group(Precision.INT8_WEIGHT) == 128


def test_kinds_limit_the_default_but_not_the_rules():
    recipe = Recipe(precision="int8", kinds=("conv2d",), rules=[Rule("special", Precision.INT8)])
    assert recipe.precision_of("add", "a") == (Precision.FP32, "the recipe's kinds leave out add")
    assert recipe.precision_of("add", "special")[0] is Precision.INT8
    assert Recipe(kinds=("conv2d",)).precision_of("add", "a") == (Precision.FP32, "the recipe's precision")


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"percision": "int8"}, ["'percision'", "did you mean 'precision'?"]),
        (
            {"precision": "int9"},
            [
                "precision",
                "fp32, bf16, fp16, int8, int16, int8-dynamic, int8-weight, int4-weight, auto",
                "'int9'",
                "did you mean 'int8'?",
            ],
        ),
        ({"precision": ["int8"]}, ["precision", "['int8']"]),
        ({"observer": "minmax"}, ["observer", "did you mean 'min_max'?"]),
        ({"observer": None}, ["observer", "None"]),
        ({"percentile": 50}, ["percentile", "above 50, up to 100", "50"]),
        ({"percentile": 100.1}, ["percentile", "100.1"]),
        ({"percentile": float("nan")}, ["percentile", "nan"]),
        ({"percentile": "99"}, ["percentile", "'99'"]),
        ({"momentum": 0}, ["momentum", "above 0, up to 1"]),
        ({"momentum": True}, ["momentum", "True"]),
        ({"symmetric": 1}, ["symmetric", "true or false", "1"]),
        ({"narrow_range": 1}, ["narrow_range", "true or false", "1"]),
        ({"symmetric_loss": 0}, ["symmetric_loss", "above 0, up to 10", "0"]),
        ({"symmetric_loss": True}, ["symmetric_loss", "a number", "True"]),
        ({"per_channel": "yes"}, ["per_channel", "'yes'"]),
        ({"precision": "int8_dynamic"}, ["did you mean 'int8-dynamic'?"]),
        ({"group_size": 48}, ["group_size", "one of 32, 64, 128", "48"]),
        ({"group_size": 64.0}, ["group_size", "64.0"]),
        ({"group_size": "32"}, ["group_size", "'32'"]),
        ({"kinds": ["conv"]}, ["kinds", "'conv'", "did you mean 'conv2d'?"]),
        ({"kinds": "conv2d"}, ["kinds", "a list", "'conv2d'"]),
        ({"kinds": 3}, ["kinds", "a list"]),
        ({"rules": 3}, ["rules", "a list"]),
        ({"rules": {"match": "a", "precision": "fp32"}}, ["rules", "a list"]),
        ({"rules": ["fc"]}, ["rules", "match and precision", "'fc'"]),
        ({"rules": [{"match": "fc"}]}, ["rules", "match and precision"]),
        ({"rules": [{"match": "fc", "precision": "fp32", "kind": "conv2d"}]}, ["rules", "match and precision"]),
        ({"rules": [{"match": "fc", "precision": "fp8"}]}, ["rules.precision", "'fp8'"]),
        ({"rules": [{"match": 1, "precision": "fp32"}]}, ["rules.match", "1"]),
    ],
    ids=str,
)
def test_each_mistake_is_one_line(data, parts):
    _one_line(lambda: Recipe.from_dict(data), "recipe", *parts)


def test_files_that_cannot_be_read(tmp_path: Path):
    _one_line(lambda: Recipe.from_toml(tmp_path / "absent.toml"), "absent.toml", "No such file")
    _one_line(lambda: Recipe.from_toml(tmp_path), str(tmp_path))
    bad = tmp_path / "bad.toml"
    bad.write_text("precision = int8")
    _one_line(lambda: Recipe.from_toml(bad), "bad.toml", "a TOML file")
    bad.write_bytes(b"\xff\xfe")
    _one_line(lambda: Recipe.from_toml(bad), "bad.toml", "a TOML file")


def test_the_percentile_may_be_100_and_recipes_are_values():
    assert Recipe(percentile=100).percentile == 100
    assert hash(Recipe(precision="int8")) == hash(Recipe(precision="int8"))
    assert set(KINDS) == {
        "conv2d",
        "matmul",
        "add",
        "subtract",
        "multiply",
        "unary",
        "avg_pool2d",
        "max_pool2d",
        "concat",
        "attention",
        "batch_matmul",
        "layer_norm",
        "group_norm",
        "softmax",
        "embedding",
    }


def test_moving_average_is_an_aggregate_of_the_extremes():
    recipe = Recipe(observer="moving_average")
    assert (recipe.observer, recipe.aggregate) == (Observer.MIN_MAX, Aggregate.MOVING_AVERAGE)
    assert Recipe(observer="moving_average", aggregate="moving_average") == recipe
    _one_line(lambda: Recipe(observer="moving_average", aggregate="mean"), "aggregate", "moving_average", "'mean'")


@pytest.mark.parametrize("bits", [1, 9, 7.5, True, "8"])
@pytest.mark.parametrize("name", ["activation_bits", "weight_bits"])
def test_bits(name: str, bits: object):
    _one_line(lambda: Recipe(**{name: bits}), name, "from 2 to 8", repr(bits))


def test_fixed_range_is_positive():
    _one_line(lambda: Recipe(fixed_range=0.0), "fixed_range", "above 0")
