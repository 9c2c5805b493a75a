import numpy as np
import pytest
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import AddBias, AddTensor, Apply, Chain, Limit, TimesChannels, find_chains

SHAPE = (1, 5, 5, 4)
op = relax.op


def _conv(x, layout: str = "NHWC", kernel: str = "OHWI"):
    shape = (4, 3, 3, 4) if kernel == "OHWI" else (5, 5, 3, 3)
    weight = relax.const(np.ones(shape, np.float32))
    return op.nn.conv2d(x, weight, (1, 1), (1, 1), (1, 1), 1, layout, kernel, layout)


def _const(*shape: int) -> object:
    return relax.const(np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape))


def _chains(module: tvm.IRModule) -> list[str]:
    return [f"{chain.kind}: {' '.join(str(v.name) for v in chain.members)}" for chain in find_chains(module)]


def _kinds(chain: Chain) -> list[type]:
    return [type(follower) for follower in chain.followers]


def test_a_chain_grows_over_bias_residual_limits_and_activation(graph):
    def build(emit, x):
        c = emit(_conv(x), "c")
        b = emit(op.add(c, _const(4)), "b")
        a = emit(op.add(x, b), "a")
        r = emit(op.nn.relu(a), "r")
        return emit(op.nn.gelu(emit(op.clip(r, 0, 6), "l")), "g")

    (chain,) = find_chains(graph(build, SHAPE))
    assert _chains(graph(build, SHAPE)) == ["conv2d: c b a r l g"]
    assert _kinds(chain) == [AddBias, AddTensor, Limit, Limit, Apply]
    assert chain.followers[0].value.tolist() == [0, 1, 2, 3]
    assert chain.followers[2:] == (Limit(0.0, None), Limit(0.0, 6.0), Apply("gelu"))
    assert [str(v.name) for v in chain.activations] == ["x0", "x0"]
    assert (str(chain.x.name), str(chain.anchor.name), str(chain.end.name)) == ("x0", "c", "g")


def test_a_residual_merges_into_the_later_convolution(graph):
    def build(emit, x):
        first = emit(_conv(x), "first")
        second = emit(_conv(x), "second")
        return emit(op.nn.relu(emit(op.add(first, second), "sum")), "r")

    # The earlier one's result is ready when the later one ends, in whichever order they are added.
    assert _chains(graph(build, SHAPE)) == ["conv2d: first", "conv2d: second sum r"]
    (_, later) = find_chains(graph(build, SHAPE))
    assert [str(v.name) for v in later.activations] == ["x0", "first"]


def test_a_tensor_with_two_readers_ends_its_chain(graph):
    def build(emit, x):
        c = emit(_conv(x), "c")
        b = emit(op.add(c, _const(4)), "b")
        return emit(op.nn.relu(b), "r"), emit(op.sigmoid(b), "s")

    assert _chains(graph(build, SHAPE)) == ["conv2d: c b", "unary: r", "unary: s"]


def test_an_output_ends_its_chain(graph):
    def build(emit, x):
        c = emit(_conv(x), "c")
        return c, emit(op.nn.relu(c), "r")

    assert _chains(graph(build, SHAPE)) == ["conv2d: c", "unary: r"]


def test_a_tensor_added_to_itself_has_two_readers(graph):
    def build(emit, x):
        c = emit(_conv(x), "c")
        return emit(op.nn.relu(emit(op.add(c, c), "twice")), "r")

    assert _chains(graph(build, SHAPE)) == ["conv2d: c", "add: twice r"]
    (_, twice) = find_chains(graph(build, SHAPE))
    assert [str(v.name) for v in twice.activations] == ["c", "c"]


def test_pools_means_and_matmuls_are_anchors(graph):
    def build(emit, x):
        p = emit(op.nn.avg_pool2d(x, (2, 2), (1, 1), layout="NHWC", out_layout="NHWC"), "p")
        a = emit(op.nn.adaptive_avg_pool2d(emit(op.nn.relu(p), "pr"), (2, 2), "NHWC", "NHWC"), "a")
        m = emit(op.mean(a, [1, 2]), "m")
        return emit(op.nn.relu(emit(op.add(emit(op.matmul(m, _const(4, 3)), "mm"), _const(3)), "b")), "r")

    assert _chains(graph(build, SHAPE)) == ["avg_pool2d: p pr", "avg_pool2d: a", "avg_pool2d: m", "matmul: mm b r"]


@pytest.mark.parametrize(
    ("low", "high", "limit"),
    [
        (0.0, 6.0, Limit(0.0, 6.0)),
        (0.1, float("inf"), Limit(0.1, None)),
        (float("-inf"), 2.0, Limit(None, 2.0)),
        (float("-inf"), float("inf"), Limit(None, None)),
    ],
)
def test_open_sides_of_a_clip_are_none(graph, low: float, high: float, limit: Limit):
    (chain,) = find_chains(graph(lambda emit, x: emit(op.clip(x, low, high), "l"), SHAPE))
    assert chain.kind == "unary" and chain.followers == (limit,)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1, 1, 4), (1, 1, 1, 1)])
def test_what_is_a_bias(graph, shape: tuple[int, ...]):
    (chain,) = find_chains(graph(lambda emit, x: emit(op.add(emit(_conv(x), "c"), _const(*shape)), "b"), SHAPE))
    assert _kinds(chain) == [AddBias]
    assert chain.followers[0].value.shape == (4,)


@pytest.mark.parametrize("shape", [(5, 4), (5, 1), (1, 5, 5, 4), (1, 5, 1, 1), (2, 1, 1, 4), (1, 1, 1, 1, 1)])
def test_what_is_no_bias(graph, shape: tuple[int, ...]):
    # Not one number a channel, or the result has another shape.
    assert _chains(graph(lambda emit, x: emit(op.add(emit(_conv(x), "c"), _const(*shape)), "b"), SHAPE)) == [
        "conv2d: c"
    ]


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4), (1, 1, 1, 4)])
@pytest.mark.parametrize("swapped", [False, True])
def test_what_multiplies_channels(graph, shape: tuple[int, ...], swapped: bool):
    def build(emit, x):
        factors, c = _const(*shape), emit(_conv(x), "c")
        return emit(op.multiply(factors, c) if swapped else op.multiply(c, factors), "m")

    (chain,) = find_chains(graph(build, SHAPE))
    assert _kinds(chain) == [TimesChannels] and chain.followers[0].value.shape == (4,)


@pytest.mark.parametrize("shape", [(), (1,), (5, 4), (5, 1), (1, 5, 1, 1), (1, 1, 1, 1, 4)])
def test_what_multiplies_no_channels(graph, shape: tuple[int, ...]):
    module = graph(lambda emit, x: emit(op.multiply(emit(_conv(x), "c"), _const(*shape)), "m"), SHAPE)
    assert _chains(module) == ["conv2d: c"]


def _add_broadcast(emit, x):
    return emit(op.add(emit(_conv(x), "c"), emit(op.mean(x, [1, 2], keepdims=True), "m")), "a")


def test_a_residual_of_another_shape_is_not_held(graph):
    assert _chains(graph(_add_broadcast, SHAPE)) == ["conv2d: c", "avg_pool2d: m"]


def test_operators_an_epilogue_cannot_hold_end_the_chain(graph):
    def build(emit, x):
        c = emit(_conv(x), "c")
        return emit(op.multiply(c, _const(1)), "scaled")

    assert _chains(graph(build, SHAPE)) == ["conv2d: c"]

    def reshaped(emit, x):
        return emit(op.nn.relu(emit(op.reshape(emit(_conv(x), "c"), (1, 100)), "s")), "r")

    assert _chains(graph(reshaped, SHAPE)) == ["conv2d: c", "unary: r"]


@pytest.mark.parametrize(
    "build",
    [
        lambda emit, x: emit(_conv(x, "NCHW", "OIHW"), "c"),
        lambda emit, x: emit(op.matmul(x, emit(op.permute_dims(x, [0, 1, 3, 2]), "t")), "m"),
        lambda emit, x: emit(op.mean(x, [2, 3]), "m"),
        lambda emit, x: emit(op.mean(x, [0, 2]), "m"),
        lambda emit, x: emit(op.mean(x, [-1]), "m"),
        lambda emit, x: emit(op.mean(x), "m"),
        lambda emit, x: emit(op.mean(emit(op.reshape(x, (5, 5, 4)), "s"), [1, 2]), "m"),
        lambda emit, x: emit(op.nn.avg_pool2d(x, (2, 2), (2, 2), ceil_mode=True, layout="NHWC"), "p"),
        lambda emit, x: emit(op.nn.avg_pool2d(x, (2, 2), (2, 2)), "p"),  # NCHW
        lambda emit, x: emit(op.add(x, _const(5, 4)), "a"),
        lambda emit, x: emit(op.multiply(x, _const(1)), "m"),
        lambda emit, x: emit(op.subtract(_const(4), x), "s"),
        lambda emit, x: emit(op.nn.max_pool2d(x, (2, 2), layout="NHWC"), "p"),
        lambda emit, x: emit(op.nn.relu(emit(op.astype(x, "float64"), "d")), "r"),
        lambda emit, x: emit(op.nn.relu(emit(op.astype(x, "int32"), "i")), "r"),
    ],
)
def test_what_starts_no_chain(graph, build):
    assert _chains(graph(build, SHAPE)) == []


@pytest.mark.parametrize("swapped", [False, True])
def test_constants_of_channels_start_chains(graph, swapped: bool):
    def build(emit, x):
        pooled = emit(op.nn.max_pool2d(x, (2, 2), layout="NHWC"), "p")
        pair = (_const(4), pooled) if swapped else (pooled, _const(4))
        return emit(op.nn.relu(emit(op.add(emit(op.multiply(*pair), "m"), _const(1)), "a")), "r")

    module = graph(build, SHAPE)
    (chain,) = find_chains(module)
    assert _chains(module) == ["unary: m a r"] and _kinds(chain) == [TimesChannels, AddBias, Limit]
    assert str(chain.x.name) == "p" and not chain.is_affine
    (chain,) = find_chains(graph(lambda emit, x: emit(op.add(x, _const(4)), "a"), SHAPE))
    assert chain.kind == "unary" and chain.is_affine


@pytest.mark.parametrize("axes", [[0], [1], [2], [0, 1], [-2, -3], [0, 1, 2]])
def test_means_of_neighbours_before_the_last_axis_start_chains(graph, axes: list[int]):
    assert _chains(graph(lambda emit, x: emit(op.nn.relu(emit(op.mean(x, axes), "m")), "r"), SHAPE)) == [
        "avg_pool2d: m r"
    ]


def test_a_weight_that_is_an_activation_starts_no_chain(graph):
    module = graph(lambda emit, x, w: emit(op.matmul(x, w), "m"), (3, 4), (4, 5))
    assert _chains(module) == []


def test_a_residual_that_is_computed_after_the_anchor(graph):
    def build(emit, x):
        r = emit(op.nn.relu(x), "r")
        s = emit(op.sigmoid(emit(op.nn.max_pool2d(x, (1, 1), layout="NHWC", out_layout="NHWC"), "p")), "s")
        return emit(op.add(r, s), "a")

    # `r` is first: its chain ends in the add, when `s` is ready.
    assert _chains(graph(build, SHAPE)) == ["unary: r a", "unary: s"]


def test_no_variable_is_in_two_chains_and_every_chain_is_a_path(any_case):
    chains = find_chains(any_case.module)
    members = [member for chain in chains for member in chain.members]
    assert len(members) == len(set(members))
    readers = ir.users(any_case.module)
    for chain in chains:
        for member, following in zip(chain.members, chain.members[1:], strict=False):
            assert readers[member] == [following]


def test_the_chains_of_the_qdq_graph_are_those_of_the_float_graph(graph, any_case):
    assert _chains(any_case.qdq()) == _chains(any_case.module)
