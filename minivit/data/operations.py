"""The fifteen image operations of AutoAugment, and the three policies that draw from them, on uint8 batches.

Each image of a batch gets an operation and a magnitude of its own. `operate` sorts the batch by operation, so that
images of the same kind lie side by side, and works through four groups, each vectorised over its images:

=========  =============================================  ===================================================
group      operations                                     how
=========  =============================================  ===================================================
geometry   shear_x/y, translate_x/y, rotate               one affine map per image, bilinear
blend      brightness, color, contrast, sharpness         f x + (1 - f) (black, grey, mean grey, blurred x)
tables     posterize, solarize, invert,                   a table of 256 new values per image and channel
           autocontrast, equalize
identity                                                  nothing is touched
=========  =============================================  ===================================================

The arrays may live on the host or on a device. What is drawn (operations, magnitudes, signs) is drawn on the host, and
the arithmetic is of whole numbers or of single float32 operations, so a seed gives the same bits everywhere; nothing
waits for the device. Values agree with torchvision's operations on uint8 tensors: exactly, but for geometry, where its
float32 interpolation and the one here in fixed point may round to neighbouring levels.

Where conventions differ from torchvision's policy classes: they interpolate by the nearest pixel unless told otherwise,
here it is always bilinear; TrivialAugment moves images of less than 32 pixels by at most their own size.

Source  Cubuk et al., "AutoAugment", arXiv:1805.09501; Cubuk et al., "RandAugment", arXiv:1909.13719;
        Mueller and Hutter, "TrivialAugment", arXiv:2103.10158.
"""

import numpy as np

from minivit.base.backend import array_module

GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("brightness", "color", "contrast", "sharpness")
TABLES = ("posterize", "solarize", "invert", "autocontrast", "equalize")
OPERATIONS = ("identity", *GEOMETRY, *BLENDS, *TABLES)
CODE = {name: code for code, name in enumerate(OPERATIONS)}
SIGNED = np.isin(OPERATIONS, GEOMETRY + BLENDS)  # magnitudes of these come with either sign

POLICIES = ("none", "trivial", "rand", "auto")
BINS = 31  # steps of a magnitude in TrivialAugment and RandAugment

# AutoAugment's 25 sub-policies for CIFAR-10: two operations, each with its probability and its magnitude, 0 to 9.
_CIFAR10 = """
invert 0.1 0, contrast 0.2 6          rotate 0.7 2, translate_x 0.3 9       sharpness 0.8 1, sharpness 0.9 3
shear_y 0.5 8, translate_y 0.7 9      autocontrast 0.5 0, equalize 0.9 0    shear_y 0.2 7, posterize 0.3 7
color 0.4 3, brightness 0.6 7         sharpness 0.3 9, brightness 0.7 9     equalize 0.6 0, equalize 0.5 0
contrast 0.6 7, sharpness 0.6 5       color 0.7 7, translate_x 0.5 8        equalize 0.3 0, autocontrast 0.4 0
translate_y 0.4 3, sharpness 0.2 6    brightness 0.9 6, color 0.2 8         solarize 0.5 2, invert 0.0 0
equalize 0.2 0, autocontrast 0.6 0    equalize 0.2 0, equalize 0.6 0        color 0.9 9, equalize 0.6 0
autocontrast 0.8 0, solarize 0.2 8    brightness 0.1 3, color 0.7 0         solarize 0.4 5, autocontrast 0.9 0
translate_y 0.9 9, translate_y 0.7 9  autocontrast 0.9 0, solarize 0.8 3    equalize 0.8 0, invert 0.1 0
translate_y 0.7 9, autocontrast 0.9 0
"""
_CIFAR10 = np.array(_CIFAR10.replace(",", " ").split()).reshape(-1, 2, 3)  # (25, 2, 3) of texts
_AUTO = {
    "operation": np.vectorize(CODE.get)(_CIFAR10[..., 0]),  # (25, 2) each
    "probability": _CIFAR10[..., 1].astype(float),
    "magnitude": _CIFAR10[..., 2].astype(int),
}


# ---- the operations --------------------------------------------------------------------------------------------------


def operate(images, operations, magnitudes):
    """Apply to each image its own operation.

    Shapes  images (B, H, W, C) uint8, on any device; on the host operations (B,), indices into ``OPERATIONS``, and
            magnitudes (B,)  ->  (B, H, W, C) uint8
    Units   of the magnitude: shear_x/y pixels per row or column, from the upper left corner; translate_x/y pixels
            right or down, the fraction dropped; rotate degrees, counter-clockwise; what moves in is black.
            brightness, color, contrast, sharpness: the factor f - 1. posterize: bits kept. solarize: the value from
            which on pixels are inverted. The others have none.
    """
    xp = array_module(images)
    if images.shape[-1] != 3:  # grey images have no colour to change
        operations = np.where(operations == CODE["color"], CODE["identity"], operations)
    order = np.argsort(operations, kind="stable")
    operations, magnitudes = operations[order], magnitudes[order]
    rows = xp.asarray(order)
    images = images[rows]  # images of one operation now lie side by side
    for names, function in ((GEOMETRY, _geometry), (BLENDS, _blend), (TABLES, _tables)):
        start, stop = np.searchsorted(operations, [CODE[names[0]], CODE[names[-1]] + 1])
        if start < stop:
            part = slice(start, stop)
            images[part] = function(images[part], operations[part], magnitudes[part])
    result = xp.empty_like(images)
    result[rows] = images
    return result


def _slices(names, operations):
    """For each name the slice that it takes in the sorted operations."""
    return [slice(*np.searchsorted(operations, [CODE[name], CODE[name] + 1])) for name in names]


def _geometry(images, operations, magnitudes):
    """Affine maps, in fixed point: places in 1/65536 of a pixel, weights of neighbours in 1/2048.

    Math    pixel (x, y) of the result is read at (ax x + ay y + a, bx x + by y + b); x to the right, y down
    """
    xp = array_module(images)
    B, H, W, C = images.shape
    shear_x, shear_y, translate_x, translate_y, turn = _slices(GEOMETRY, operations)
    maps = np.zeros((B, 2, 3))
    maps[:, 0, 0] = maps[:, 1, 1] = 1.0
    maps[shear_x, 0, 1] = magnitudes[shear_x]
    maps[shear_y, 1, 0] = magnitudes[shear_y]
    maps[translate_x, 0, 2] = -np.trunc(magnitudes[translate_x])
    maps[translate_y, 1, 2] = -np.trunc(magnitudes[translate_y])
    angle = np.deg2rad(magnitudes[turn])
    maps[turn, 0, 0] = maps[turn, 1, 1] = np.cos(angle)
    maps[turn, 1, 0] = np.sin(angle)
    maps[turn, 0, 1] = -np.sin(angle)
    # Rotation is about the image's centre, shear about its upper left corner, half a pixel from pixel (0, 0).
    centre = np.full((B, 2), -0.5)
    centre[turn] = (W - 1) / 2, (H - 1) / 2
    maps[..., 2] += centre - np.einsum("bij,bj->bi", maps[..., :2], centre)
    maps = xp.asarray(np.rint(maps * 65536).astype(np.int32)[..., None, None])  # (B, 2, 3, 1, 1)
    x, y = xp.arange(W, dtype=np.int32), xp.arange(H, dtype=np.int32)[:, None]
    place = maps[:, :, 0] * x + maps[:, :, 1] * y + maps[:, :, 2]  # (B, 2, H, W)
    # A black frame, and no place farther out than it: then each place has four neighbours to read.
    canvas = xp.zeros((B, H + 3, W + 3, C), np.uint8)
    canvas[:, 1 : H + 1, 1 : W + 1] = images
    source_x = xp.clip(place[:, 0], -65536, W * 65536) + 65536  # (B, H, W)
    source_y = xp.clip(place[:, 1], -65536, H * 65536) + 65536
    corner = xp.arange(B, dtype=np.int32)[:, None, None] * (H + 3) + (source_y >> 16)
    corner = corner * (W + 3) + (source_x >> 16)  # the upper left neighbour, counted in pixels
    right, down = ((s & 65535) >> 5 for s in (source_x, source_y))
    right, down = right[..., None], down[..., None]  # (B, H, W, 1), 0 to 2047
    pixels = canvas.reshape(-1, C)
    near, far = (pixels[corner + i].astype(np.int32) for i in (0, 1))
    upper = (near << 11) + right * (far - near)  # (B, H, W, C)
    near, far = (pixels[corner + i].astype(np.int32) for i in (W + 3, W + 4))
    lower = (near << 11) + right * (far - near)
    return (((2048 - down) * upper + down * lower + (1 << 21)) >> 22).astype(np.uint8)


def _grey(images):
    """The luma of colour images, rounded down, (B, H, W, 1) float32; others are grey already."""
    xp = array_module(images)
    if images.shape[-1] != 3:
        return images.astype(np.float32)
    red, green, blue = (images[..., c : c + 1].astype(np.float32) for c in range(3))
    return xp.floor(0.2989 * red + 0.587 * green + 0.114 * blue)


def _blur(images):
    """The 3 x 3 mean with the middle counted five times; the outermost pixels stay."""
    H, W = images.shape[1:3]
    result = images.astype(np.int32)
    if min(H, W) < 3:
        return result
    rows = result[:, :-2] + result[:, 1:-1] + result[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    result[:, 1:-1, 1:-1] = (2 * (around + 4 * result[:, 1:-1, 1:-1]) + 13) // 26  # rounded to the nearest
    return result


def _blend(images, operations, magnitudes):
    """Between an image (f = 1) and its degenerate kind (f = 0), or beyond.

    Math    f x + (1 - f) z, cut to 0 .. 255 and rounded down; z black, grey, the mean grey, or the blurred image
    """
    xp = array_module(images)
    _, color, contrast, sharpness = _slices(BLENDS, operations)
    degenerate = xp.zeros(images.shape, np.float32)
    if color.start < color.stop:
        degenerate[color] = _grey(images[color])
    if contrast.start < contrast.stop:
        degenerate[contrast] = _grey(images[contrast]).mean(axis=(1, 2, 3), keepdims=True)
    if sharpness.start < sharpness.stop:
        degenerate[sharpness] = _blur(images[sharpness])
    factor = 1.0 + magnitudes
    factor, rest = xp.asarray(np.stack([factor, 1.0 - factor]).astype(np.float32)[..., None, None, None])
    return xp.clip(factor * images + rest * degenerate, 0.0, 255.0).astype(np.uint8)


def _tables(images, operations, magnitudes):
    """Look each pixel up in a table of its image and channel."""
    xp = array_module(images)
    B, _, _, C = images.shape
    posterize, solarize, invert, autocontrast, equalize = _slices(TABLES, operations)
    values = np.arange(256, dtype=np.uint8)
    tables = np.tile(values, (B, C, 1))
    bits = magnitudes[posterize].astype(int)[:, None, None]
    tables[posterize] &= (256 - (1 << (8 - bits))).astype(np.uint8)
    tables[solarize] = np.where(values >= magnitudes[solarize][:, None, None], 255 - values, values)
    tables[invert] = 255 - values
    tables = xp.asarray(tables)
    for part, function in ((autocontrast, _autocontrast), (equalize, _equalize)):
        if part.start < part.stop:
            tables[part] = function(images[part])
    channel = xp.arange(B * C, dtype=np.int32).reshape(B, 1, 1, C)
    return tables.reshape(-1)[images + 256 * channel]


def _autocontrast(images):
    """Tables (B, C, 256) that stretch each channel to 0 .. 255.

    Math    255 (x - min) / (max - min), rounded down; x itself where max = min
    """
    xp = array_module(images)
    low, high = images.min(axis=1).min(axis=1), images.max(axis=1).max(axis=1)  # (B, C); axis=(1, 2) is far slower
    low, high = low.astype(np.float32)[..., None], high.astype(np.float32)[..., None]
    flat = low == high
    values = xp.arange(256, dtype=np.float32)
    zero, one, full = np.float32(0), np.float32(1), np.float32(255)
    scale = xp.where(flat, one, full * (one / xp.where(flat, one, high - low)))  # rounded in torchvision's order
    stretch = (values - xp.where(flat, zero, low)) * scale
    return xp.clip(stretch, 0.0, 255.0).astype(np.uint8)


def _equalize(images):
    """Tables (B, C, 256) that spread each channel's values evenly.

    Math    with n(v) pixels of value v and step = floor(sum of n but for the largest value / 255):
            v -> floor((n(0) + .. + n(v - 1) + floor(step / 2)) / step), at most 255; v itself where step = 0
    """
    xp = array_module(images)
    B, H, W, C = images.shape
    channel = xp.arange(B * C).reshape(B, 1, 1, C)
    counts = xp.zeros(B * C * 256, np.int32)
    # bincount would wait for a device; with a 1 or indices of another type, NumPy is 50 times as slow
    xp.add.at(counts, (images + 256 * channel).ravel(), np.int32(1))
    up_to = xp.cumsum(counts.reshape(B, C, 256), axis=-1)
    below_largest = (up_to * (up_to < H * W)).max(axis=-1, keepdims=True)
    step = below_largest // 255  # (B, C, 1)
    before = up_to - counts.reshape(B, C, 256)
    values = xp.clip((before + step // 2) // xp.maximum(step, 1), 0, 255)
    return xp.where(step == 0, xp.arange(256), values).astype(np.uint8)


# ---- the policies ----------------------------------------------------------------------------------------------------


def _space(shear, shift_x, shift_y, angle, factor, bits, bins):
    """Magnitudes (15, bins) of each operation from the weakest to the strongest, which are given."""
    largest = dict.fromkeys(BLENDS, factor)
    largest |= {"shear_x": shear, "shear_y": shear, "translate_x": shift_x, "translate_y": shift_y, "rotate": angle}
    table = np.linspace(0.0, [largest.get(name, 0.0) for name in OPERATIONS], bins, axis=1)
    table[CODE["posterize"]] = 8 - np.rint(np.linspace(0.0, 8 - bits, bins))
    table[CODE["solarize"]] = np.linspace(255.0, 0.0, bins)
    return table


def _with_sign(operations, magnitudes, rng):
    """The magnitudes, each negated with probability 1/2 where its operation has a sign."""
    return magnitudes * np.where(SIGNED[operations], rng.choice([-1.0, 1.0], operations.shape), 1.0)


def wide_space(H, W):
    """The magnitudes of `trivial_augment` for images of a size, without signs: (15, 31), weakest first."""
    return _space(0.99, min(32, W), min(32, H), 135.0, 0.99, 2, BINS)


def usual_space(H, W, bins=BINS):
    """The magnitudes of `rand_augment`, and in ten steps those of `auto_augment`: (15, bins), weakest first."""
    return _space(0.3, 150 / 331 * W, 150 / 331 * H, 30.0, 0.9, 4, bins)


_WITHOUT_INVERT = np.delete(np.arange(len(OPERATIONS)), CODE["invert"])


def trivial_augment(images, rng):
    """One operation of 14 at one of 31 strengths for each image, in the "wide" space.

    Largest magnitudes  shear 0.99, shift 32 pixels (at most the image's size), 135 degrees, factors 1 +- 0.99,
                        posterize to 2 bits, solarize from 0 on
    Shapes  images (B, H, W, C) uint8  ->  (B, H, W, C) uint8
    Source  Mueller and Hutter, "TrivialAugment", arXiv:2103.10158, table 1.
    """
    B, H, W, _ = images.shape
    space = wide_space(H, W)
    operations = rng.choice(_WITHOUT_INVERT, B)
    magnitudes = space[operations, rng.integers(0, BINS, B)]
    return operate(images, operations, _with_sign(operations, magnitudes, rng))


def rand_augment(images, rng, *, count=2, magnitude=9):
    """``count`` operations of 14, one after the other, all at strength ``magnitude`` of 0 .. 30, for each image.

    Largest magnitudes  shear 0.3, shift 150/331 of the image, 30 degrees, factors 1 +- 0.9, posterize to 4 bits,
                        solarize from 0 on
    Shapes  images (B, H, W, C) uint8  ->  (B, H, W, C) uint8
    Source  Cubuk et al., "RandAugment", arXiv:1909.13719.
    """
    B, H, W, _ = images.shape
    space = usual_space(H, W)
    for _ in range(count):
        operations = rng.choice(_WITHOUT_INVERT, B)
        images = operate(images, operations, _with_sign(operations, space[operations, magnitude], rng))
    return images


def auto_augment(images, rng):
    """For each image one of the 25 pairs of operations that a search found for CIFAR-10.

    Shapes  images (B, H, W, C) uint8  ->  (B, H, W, C) uint8
    Source  Cubuk et al., "AutoAugment", arXiv:1805.09501, table 7; magnitudes are those of RandAugment's space in ten
            steps, as in torchvision.
    """
    B, H, W, _ = images.shape
    space = usual_space(H, W, bins=10)
    pairs = rng.integers(0, len(_CIFAR10), B)
    for i in range(2):
        operations, strengths = (_AUTO[key][pairs, i] for key in ("operation", "magnitude"))
        happens = rng.random(B) < _AUTO["probability"][pairs, i]
        magnitudes = _with_sign(operations, space[operations, strengths], rng)
        images = operate(images, np.where(happens, operations, CODE["identity"]), magnitudes)
    return images
