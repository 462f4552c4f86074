"""The hybrid's layers against definitions that a reader can check: loops over pixels, and known small cases."""

import numpy as np
import pytest

from minivit.laboratory.gradcheck import check
from minivit.layers.layernorm import layernorm_forward
from minivit.options.stem.conv2d import _columns, conv2d_backward, conv2d_forward, same_padding
from minivit.options.stem.groupnorm import groupnorm_forward
from minivit.options.stem.max_pool import max_pool_backward, max_pool_forward
from minivit.options.stem.relu import relu_backward, relu_forward
from minivit.options.stem.resnet import bottleneck_forward, convolutions, official_name, output_of, resnet_forward
from minivit.options.stem.weight_standardization import weight_standardization_backward, weight_standardization_forward


def windows(x, kernel, stride, value):
    """Yield (row, column, window) of SAME padding, one by one, from its definition."""
    (kh, kw), sizes = kernel, x.shape[1:3]
    borders = []
    for size, k in zip(sizes, kernel, strict=True):
        out = -(-size // stride)
        total = max((out - 1) * stride + k - size, 0)
        borders.append((total // 2, total - total // 2))
    padded = np.pad(x, [(0, 0), *borders, (0, 0)], constant_values=value)
    for r in range(-(-sizes[0] // stride)):
        for c in range(-(-sizes[1] // stride)):
            yield r, c, padded[:, r * stride : r * stride + kh, c * stride : c * stride + kw]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (7, 7), (4, 1), (1, 2)])
@pytest.mark.parametrize("size", [(5, 6), (8, 7), (1, 2)])
def test_convolution_is_its_definition(kernel, stride, size):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, *size, 3)), rng.standard_normal((*kernel, 3, 4))
    y, _ = conv2d_forward(x, w, stride=stride)
    assert y.shape == (2, -(-size[0] // stride), -(-size[1] // stride), 4)
    for r, c, window in windows(x, kernel, stride, 0.0):
        np.testing.assert_allclose(y[:, r, c], np.einsum("bijk,ijko->bo", window, w), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [(224, 7, 2, (2, 3)), (112, 3, 2, (0, 1)), (56, 3, 1, (1, 1)), (56, 3, 2, (0, 1)), (7, 3, 2, (1, 1)),
     (56, 1, 2, (0, 0)), (5, 2, 1, (0, 1))],
)  # fmt: skip
def test_an_odd_zero_comes_after_the_map(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected


def test_a_kernel_of_one_pixel_copies_nothing():
    x = np.zeros((2, 5, 4, 3))
    assert np.shares_memory(_columns(x, (1, 1), 1), x)


def test_convolution_can_leave_out_the_input_gradient():
    rng = np.random.default_rng(0)
    y, cache = conv2d_forward(rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((3, 3, 3, 2)))
    dx, dw = conv2d_backward(y, cache, need_dx=False)
    assert y.shape == (2, 5, 4, 2)  # every step is one pixel unless told otherwise
    assert dx is None and np.array_equal(dw, conv2d_backward(y, cache)[1])


@pytest.mark.parametrize("size", [(6, 5), (7, 8), (1, 3)])
def test_pooling_is_its_definition(size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)) - 5.0  # all negative: a border of zeros would win
    y, _ = max_pool_forward(x)
    for r, c, window in windows(x, (3, 3), 2, -np.inf):
        assert np.array_equal(y[:, r, c], window.max(axis=(1, 2)))


def test_of_equal_numbers_the_first_gets_the_gradient():
    x = np.zeros((1, 4, 4, 1))
    dx = max_pool_backward(np.array([1.0, 2.0, 4.0, 8.0]).reshape(1, 2, 2, 1), max_pool_forward(x)[1])
    assert np.array_equal(dx[0, :, :, 0], [[1, 0, 2, 0], [0, 0, 0, 0], [4, 0, 8, 0], [0, 0, 0, 0]])
    x[0, 1, 2, 0] = x[0, 2, 1, 0] = 3.0  # both in the first window
    dx = max_pool_backward(np.array([1.0, 2.0, 4.0, 8.0]).reshape(1, 2, 2, 1), max_pool_forward(x)[1])
    assert np.array_equal(dx[0, :, :, 0], [[0, 0, 0, 0], [0, 0, 3, 0], [0, 4, 8, 0], [0, 0, 0, 0]])


def test_numbers_that_are_not_finite_are_not_hidden():
    x = np.zeros((1, 4, 4, 1))
    x[0, 1, 1, 0] = np.nan
    with np.errstate(invalid="ignore"):
        assert np.isnan(max_pool_forward(relu_forward(x)[0])[0][0, 0, 0, 0])


def test_relu_has_no_slope_at_zero():
    y, cache = relu_forward(np.array([-2.0, 0.0, 3.0]))
    assert np.array_equal(y, [0, 0, 3]) and np.array_equal(relu_backward(np.ones(3), cache), [0, 0, 1])


def test_standardised_weights_have_mean_0_and_deviation_1():
    w = 3.0 + 5.0 * np.random.default_rng(0).standard_normal((3, 2, 4, 5))
    what, _ = weight_standardization_forward(w, eps=0.0)
    np.testing.assert_allclose(what.mean(axis=(0, 1, 2)), 0, atol=1e-15)
    np.testing.assert_allclose(what.std(axis=(0, 1, 2)), 1, rtol=1e-14)
    # eps is added to the deviation: channels of deviation 1e-5 come out with 1/2
    tiny, _ = weight_standardization_forward(1e-5 * what)
    np.testing.assert_allclose(tiny, what / 2, rtol=1e-10)


def test_a_channel_of_equal_weights_has_a_gradient():
    w = np.ones((1, 1, 3, 2))
    what, cache = weight_standardization_forward(w)
    dw = weight_standardization_backward(np.arange(6.0).reshape(w.shape), cache)
    assert not what.any()
    np.testing.assert_allclose(dw[0, 0], np.array([[-2.0, -2.0], [0, 0], [2, 2]]) * 1e5)


def test_groups_are_normalised_by_themselves():
    x = 2.0 + np.random.default_rng(0).standard_normal((2, 5, 3, 6))
    y, _ = groupnorm_forward(x, np.ones(6), np.zeros(6), groups=3, eps=0.0)
    groups = y.reshape(2, 15, 3, 2)  # neighbours are a group
    np.testing.assert_allclose(groups.mean(axis=(1, 3)), 0, atol=1e-14)
    np.testing.assert_allclose(groups.std(axis=(1, 3)), 1, rtol=1e-13)


def test_one_group_of_one_position_is_layernorm():
    x, w, b = (np.random.default_rng(0).standard_normal(shape) for shape in ((4, 1, 1, 6), (6,), (6,)))
    ours, theirs = groupnorm_forward(x, w, b, groups=1)[0], layernorm_forward(x, w, b)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def parameters(units, channels=3, width=4, seed=0):
    rng = np.random.default_rng(seed)
    named = {}
    for names, kernel, _ in convolutions(channels, width, units):
        for name, shape in zip(names, (kernel, kernel[3:], kernel[3:]), strict=True):
            named[name] = rng.standard_normal(shape)
    return named


@pytest.mark.parametrize("units", [(), (1,), (2, 1), (1, 1, 1)])
def test_the_map_has_the_size_and_channels_that_are_foretold(units):
    stride, channels = output_of(4, units)
    y, _ = resnet_forward(np.ones((2, 2 * stride, 3 * stride, 3)), parameters(units), units=units, groups=2)
    assert y.shape == (2, 2, 3, channels)


def test_a_unit_that_begins_from_zero_passes_on_its_shortcut():
    named = {name.removeprefix("stages.0.blocks.1."): a for name, a in parameters((2,)).items() if ".1." in name}
    named["norm3.weight"][...] = named["norm3.bias"][...] = 0.0
    x = np.abs(np.random.default_rng(1).standard_normal((2, 3, 5, 16)))
    assert np.array_equal(bottleneck_forward(x, named, groups=2)[0], x)


def test_conv2_has_the_stride():
    named = {n.removeprefix("stages.1.blocks.0."): a for n, a in parameters((1, 1)).items() if n.startswith("stages.1")}
    x = np.random.default_rng(2).standard_normal((1, 4, 4, 16))
    _, cache = bottleneck_forward(x, named, stride=2, groups=1)
    assert cache.conv1.conv.stride == cache.conv3.conv.stride == 1
    assert cache.conv2.conv.stride == cache.downsample.conv.stride == 2
    assert cache.conv1.norm.xhat.shape == (1, 4, 4, 8) and cache.conv2.norm.xhat.shape == (1, 2, 2, 8)


def test_official_names():
    names = {name: official_name(name) for name in parameters((1, 2))}
    assert names["stem.conv.weight"] == "conv_root/kernel" and names["stem.norm.bias"] == "gn_root/bias"
    assert names["stages.1.blocks.0.downsample.norm.weight"] == "block2/unit1/gn_proj/scale"
    assert names["stages.1.blocks.1.conv2.weight"] == "block2/unit2/conv2/kernel"
    assert names["stages.0.blocks.0.norm3.bias"] == "block1/unit1/gn3/bias"
    assert names["stages.0.blocks.0.downsample.conv.weight"] == "block1/unit1/conv_proj/kernel"
    assert len(set(names.values())) == len(names)
    root = ["conv_root/kernel", "gn_root/scale", "gn_root/bias"]
    assert [official_name(name) for name in parameters(())] == list(names.values())[:3] == root


def test_gradients_of_a_map_of_one_position():
    """Its windows are mostly border."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((2, 1, 1, 3)), rng.standard_normal((3, 3, 3, 2))
    results = check(lambda *a: conv2d_forward(*a, stride=2), conv2d_backward, [x, w], method="complex")
    assert all(result.passed for result in results)
    assert all(result.passed for result in check(max_pool_forward, max_pool_backward, [x], method="complex"))
