"""What anchors sum against PyTorch in double precision, and against loops; integers exactly."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from tvmq.quantize import anchors, numerics
from tvmq.quantize.numerics import F32

GEOMETRIES = [
    # height, width, channels, outputs, kernel, strides, padding (top, left, bottom, right), dilation, groups
    (5, 5, 3, 4, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (7, 9, 4, 6, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 2),
    (8, 7, 8, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 8),
    (9, 8, 6, 12, (3, 1), (2, 1), (1, 0, 1, 0), (1, 1), 6),
    (11, 10, 2, 3, (3, 3), (1, 2), (2, 2, 2, 2), (2, 2), 1),
    (6, 6, 5, 7, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (6, 5, 5, 7, (1, 1), (2, 3), (0, 0, 0, 0), (1, 1), 1),
    (6, 6, 3, 4, (2, 2), (2, 2), (0, 1, 1, 0), (1, 1), 1),
    (4, 4, 3, 4, (4, 4), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (7, 7, 3, 2, (5, 3), (3, 2), (2, 0, 1, 3), (1, 2), 1),
]


def _torch_conv(x, weight, kernel, strides, padding, dilation, groups):
    top, left, bottom, right = padding
    image = functional.pad(torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float64)), (left, right, top, bottom))
    w = torch.from_numpy(weight.transpose(0, 3, 1, 2).astype(np.float64))
    y = functional.conv2d(image, w, stride=strides, dilation=dilation, groups=groups)
    return y.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv2d_agrees_with_pytorch(geometry):
    height, width, channels, outputs, kernel, strides, padding, dilation, groups = geometry
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, height, width, channels))
    weight = rng.standard_normal((outputs, *kernel, channels // groups))
    options = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    expected = _torch_conv(x, weight, kernel, **options)
    np.testing.assert_allclose(anchors.conv2d(x, weight, **options), expected, rtol=1e-12, atol=1e-12)
    single = anchors.conv2d(x.astype(F32), weight.astype(F32), **options)
    assert single.dtype == F32
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-4)
    # Integers, exactly: padding holds the zero point, so that it counts as zero.
    for dtype, zero_point in (("int8", -7), ("uint8", 128)):
        q = rng.integers(*np.add(numerics.INT_RANGE[dtype], (0, 1)), x.shape).astype(dtype)
        w = rng.integers(-127, 128, weight.shape).astype(np.int8)
        got = anchors.conv2d(q, w, x_zero_point=zero_point, **options)
        assert got.dtype == np.int32
        assert (got == _torch_conv(q.astype(np.int64) - zero_point, w, kernel, **options)).all()


def test_integer_conv2d_against_a_loop():
    rng = np.random.default_rng(3)
    x = rng.integers(-128, 128, (1, 4, 5, 4)).astype(np.int8)
    w = rng.integers(-127, 128, (6, 3, 2, 2)).astype(np.int8)
    (sy, sx), (top, left, bottom, right), (dy, dx), groups, zero = (2, 1), (1, 0, 2, 1), (1, 2), 2, 11
    got = anchors.conv2d(
        x, w, strides=(sy, sx), padding=(top, left, bottom, right), dilation=(dy, dx), groups=groups, x_zero_point=zero
    )
    expected = np.zeros(got.shape, np.int64)
    for _, i, j, o in np.ndindex(got.shape):
        for ky, kx, c in np.ndindex(3, 2, 2):
            y, z = i * sy + ky * dy - top, j * sx + kx * dx - left
            if 0 <= y < 4 and 0 <= z < 5:
                expected[0, i, j, o] += (int(x[0, y, z, c + 2 * (o // 3)]) - zero) * int(w[o, ky, kx, c])
    assert got.shape == (1, 3, 4, 6)
    assert (got == expected).all()


def test_integer_products_at_their_largest():
    x = np.full((1, 1, 1, 4096), 127, np.int8)
    w = np.full((1, 1, 1, 4096), -127, np.int8)
    options = {"strides": (1, 1), "padding": (0,) * 4, "dilation": (1, 1), "groups": 1, "x_zero_point": -128}
    assert anchors.conv2d(x, w, **options).item() == -255 * 127 * 4096
    assert anchors.matmul(x[0, 0], w[0, 0].T, x_zero_point=-128).item() == -255 * 127 * 4096


@pytest.mark.parametrize("k", [1, 7, 8, 9, 31, 32, 33])
def test_matmul(k: int):
    rng = np.random.default_rng(k)
    q, w = rng.integers(0, 256, (2, 3, k)).astype(np.uint8), rng.integers(-127, 128, (k, 5)).astype(np.int8)
    got = anchors.matmul(q, w, x_zero_point=131)
    assert got.dtype == np.int32
    assert (got == (q.astype(np.int64) - 131) @ w.astype(np.int64)).all()
    x, f = rng.standard_normal((3, k)).astype(F32), rng.standard_normal((k, 5)).astype(F32)
    assert anchors.matmul(x, f).dtype == F32
    np.testing.assert_allclose(anchors.matmul(x, f), x.astype(np.float64) @ f, rtol=1e-4, atol=1e-5)


POOLS = [
    ((2, 2), (2, 2), (0, 0)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 3), (1, 1), (1, 1)),
    ((3, 2), (1, 2), (0, 1)),
    ((7, 9), (7, 9), (0, 0)),
]


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(("pool", "strides", "padding"), POOLS, ids=str)
def test_avg_pool2d_agrees_with_pytorch(pool, strides, padding, count_include_pad):
    rng = np.random.default_rng(0)
    q, zero_point = rng.integers(-128, 128, (2, 7, 9, 3)).astype(np.int8), 17
    options = {
        "pool": pool,
        "strides": strides,
        "padding": (*padding, *padding),
        "count_include_pad": count_include_pad,
    }
    image = torch.from_numpy((q.astype(np.float64) - zero_point).transpose(0, 3, 1, 2))
    expected = functional.avg_pool2d(image, pool, strides, padding, count_include_pad=count_include_pad)
    got = anchors.avg_pool2d(q, x_zero_point=zero_point, **options)
    assert got.dtype == F32
    np.testing.assert_allclose(got, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-6, atol=1e-6)
    x = (q.astype(F32) - zero_point) * F32(0.1)
    single = anchors.avg_pool2d(x, **options)
    assert single.dtype == F32
    np.testing.assert_allclose(single, 0.1 * expected.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_avg_pool2d_is_a_sum_times_a_rounded_reciprocal():
    q = np.array([1, 1, 3], np.int8).reshape(1, 1, 3, 1)
    got = anchors.avg_pool2d(q, pool=(1, 3), strides=(1, 1), padding=(0,) * 4, count_include_pad=False)
    assert got.item() == float(F32(5) * F32(1 / 3))


@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize(("pool", "strides", "padding"), POOLS[:4], ids=str)
def test_max_pool2d_agrees_with_pytorch(pool, strides, padding, dilation):
    rng = np.random.default_rng(0)
    q = rng.integers(-128, -100, (2, 7, 9, 3)).astype(np.int8)  # padding would win if it counted as zero
    options = {"pool": pool, "strides": strides, "padding": (*padding, *padding), "dilation": dilation}
    image = torch.from_numpy(q.astype(np.float64).transpose(0, 3, 1, 2))
    expected = functional.max_pool2d(image, pool, strides, padding, dilation).numpy().transpose(0, 2, 3, 1)
    assert (anchors.max_pool2d(q, **options) == expected).all()
    assert anchors.max_pool2d(q, **options).dtype == np.int8
    assert (anchors.max_pool2d(q.astype(F32), **options) == expected).all()
    stored = (q.astype(np.int32) + 128).astype(np.uint8)
    assert (anchors.max_pool2d(stored, **options) == expected + 128).all()
