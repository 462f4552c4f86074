"""Figures of predictions against values worked out by hand."""

import json
import math

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.evaluation.metrics import best_temperature, calibration, measure, read_real, real_accuracy
from minivit.layers.loss import softmax_cross_entropy_forward
from minivit.layers.softmax import softmax_forward


def test_few_classes_have_no_top_five():
    logits = np.eye(3)[[0, 0, 1, 1]]
    figures, confusion = measure(logits, np.array([0, 1, 1, 1]), ("a", "b", "c"))
    assert "top5_accuracy" not in figures and figures["accuracy"] == 0.75
    assert confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert [c["accuracy"] for c in figures["classes"]] == [0.75, 0.75, 1.0]
    assert [c["precision"] for c in figures["classes"]] == [0.5, 1.0, None]
    assert [c["recall"] for c in figures["classes"]] == [1.0, pytest.approx(2 / 3), None]


def test_top_five_of_many_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((200, 50)), rng.integers(0, 50, 200)
    figures, _ = measure(logits, labels, [str(k) for k in range(50)])
    expected = np.mean([label in np.argsort(row)[-5:] for row, label in zip(logits, labels, strict=True)])
    assert 0.02 < figures["top5_accuracy"] == expected < 0.25


# ---- calibration -----------------------------------------------------------------------------------------------------


def two_classes(confidences, right):
    """Probabilities of two classes: the first is predicted with these confidences, and is the label where right."""
    c = np.array(confidences)
    return np.stack([c, 1 - c], axis=1), np.where(right, 0, 1)


def test_calibration_by_hand():
    # four bins: (1/4, 1/2] holds nothing, (1/2, 3/4] 0.6 right and 0.7 wrong, (3/4, 1] 0.8, 0.9 right and 1.0 wrong
    found = calibration(*two_classes([0.6, 0.7, 0.8, 0.9, 1.0], [1, 0, 1, 1, 0]), bins=4)
    assert found.count.tolist() == [0, 0, 2, 3]
    np.testing.assert_allclose(found.accuracy, [np.nan, np.nan, 1 / 2, 2 / 3], rtol=1e-12)
    np.testing.assert_allclose(found.confidence, [np.nan, np.nan, 0.65, 0.9], rtol=1e-12)
    # 2/5 |0.5 - 0.65| + 3/5 |2/3 - 0.9| = 0.06 + 0.14
    assert found.error == pytest.approx(0.2, rel=1e-12)


def test_a_bin_is_open_below_and_closed_above():
    confidences = [np.nextafter(0.75, 0), 0.75, np.nextafter(0.75, 1)]
    assert calibration(*two_classes(confidences, [1, 1, 1]), bins=4).count.tolist() == [0, 0, 2, 1]
    third = np.full((1, 3), 1 / 3)
    assert calibration(third, np.array([0]), bins=3).count.tolist() == [1, 0, 0]  # 1/3 ends the first bin
    assert calibration(*two_classes([1.0], [1])).count.tolist() == [0] * 14 + [1]


def test_a_model_that_says_how_often_it_is_right_is_calibrated():
    probabilities, labels = two_classes([0.75] * 8 + [0.5] * 4, [1] * 6 + [0] * 2 + [1] * 2 + [0] * 2)
    assert calibration(probabilities, labels).error == pytest.approx(0.0, abs=1e-15)
    sure = calibration(*two_classes([1.0] * 4, [1, 0, 0, 0]))
    assert sure.error == 0.75 and sure.accuracy[-1] == 0.25 and sure.confidence[-1] == 1.0


def test_errors_within_a_bin_cancel_and_between_bins_do_not():
    # one bin: mean confidence 0.75, accuracy 0.75; two bins split the same predictions
    pair = two_classes([0.5, 1.0, 0.5, 1.0], [1, 1, 1, 0])
    assert calibration(*pair, bins=1).error == 0.0
    assert calibration(*pair, bins=2).error == 0.5


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), 15),
        (np.ones((2, 1)), np.zeros(2, int), 0),
        (np.ones((2, 1)), np.zeros(3, int), 15),
        (np.ones(2), np.zeros(2, int), 15),
    ],
)
def test_calibration_of_what_does_not_fit(probabilities, labels, bins):
    with pytest.raises(ValueError, match="bins must be|are needed"):
        calibration(probabilities, labels, bins=bins)


# ---- temperature -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "wrong"), [(3, 1), (9, 1), (2, 1), (99, 1)])
def test_temperature_by_hand(right, wrong):
    """Logits (a, 0): the best probability of the first class is its share q, so that a / T = log(q / (1 - q))."""
    logits = np.tile([2.0, 0.0], (right + wrong, 1))
    labels = np.repeat([0, 1], [right, wrong])
    assert best_temperature(logits, labels) == pytest.approx(2.0 / math.log(right / wrong), rel=1e-9)


def test_no_other_temperature_is_better():
    rng = np.random.default_rng(0)
    logits = 3.0 * rng.standard_normal((400, 7)).astype(np.float32)
    labels = np.array([rng.choice(7, p=p / p.sum()) for p in softmax_forward(logits.astype(float) / 2.5)[0]])

    def loss(T):
        return softmax_cross_entropy_forward(logits.astype(np.float64) / T, labels)[0]

    T = best_temperature(logits, labels)
    assert 2.0 < T < 3.2  # the labels were drawn at 2.5
    assert loss(T) < min(loss(0.999 * T), loss(1.001 * T), loss(1.0))
    # T follows the scale of the logits, and no shift of a row
    shifted = logits.astype(np.float64) * 1e-3 + rng.standard_normal((400, 1))
    assert best_temperature(shifted, labels) == pytest.approx(1e-3 * T, rel=1e-6)


def test_where_no_temperature_is_best():
    logits = np.array([[4.0, 1.0], [0.0, 3.0]])
    assert best_temperature(logits, np.array([0, 1])) == 0.0  # all right: the colder, the better
    assert best_temperature(logits, np.array([1, 0])) == math.inf  # all wrong: the warmer, the better
    assert best_temperature(np.tile([2.0, 0.0], (2, 1)), np.array([0, 1])) == math.inf  # half right, as by chance
    assert best_temperature(np.zeros((3, 5)), np.array([0, 1, 2])) == math.inf  # the head starts at zero


@pytest.mark.parametrize("logits", [np.zeros((0, 3)), np.array([[np.nan, 0.0]]), np.array([[np.inf, 0.0]])])
def test_temperature_of_what_has_none(logits):
    with pytest.raises(ValueError, match="finite"):
        best_temperature(logits, np.zeros(len(logits), int))


NAMES = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (4, 1, 3, 2)]  # in another order than the file's
REAL = [[2], [0, 1], [], [1, 2], [0]]


def test_real_accuracy_by_hand(tmp_path):
    """Images 4, 1, 3, 2 have the labels {1, 2}, {2}, none and {0, 1}."""
    (path := tmp_path / "real.json").write_text(json.dumps(REAL))
    real = read_real(path, NAMES, 3)
    assert real == [[1, 2], [2], [], [0, 1]]
    assert real_accuracy(np.array([2, 2, 0, 2]), real) == (2 / 3, 3)
    assert real_accuracy(np.array([1, 0, 0, 1]), real) == (2 / 3, 3)
    assert real_accuracy(np.array([0, 0, 0, 2]), real) == (0.0, 3)
    predictions = np.random.default_rng(0).integers(0, 3, 4)
    official = [pred in real[i] for i, pred in enumerate(predictions) if real[i]]  # the authors' two lines
    assert real_accuracy(predictions, real)[0] == np.mean(official)


@pytest.mark.parametrize("content, names, message", [
    (None, NAMES, "there is no file .*real.json"),
    ("[[1], [2", NAMES, "is not a JSON file"),
    ('{"a": [1]}', NAMES, "must hold a list with a list of classes, 0 to 2"),
    ("[1, 2, 3, 4]", NAMES, "must hold a list with a list of classes"),
    ("[[1], [2], [3], [0]]", NAMES, "must hold a list with a list of classes, 0 to 2"),
    ("[[true], [2], [1], [0]]", NAMES, "must hold a list with a list of classes"),
    ("[[1], [2], [0]]", NAMES, "ILSVRC2012_val_00000004.JPEG is none of the 3 images"),
    (json.dumps(REAL), ["cat.png"], "cat.png is none of the 5 images"),
    (json.dumps(REAL), ["ILSVRC2012_val_00000000.JPEG"], "is none of the 5 images"),
    (json.dumps(REAL), (), "use --data folder or imagefolder"),
    ("[[], [], [], []]", NAMES, "no label of any of the 4 test images"),
])  # fmt: skip
def test_real_labels_that_do_not_fit(tmp_path, content, names, message):
    if content is not None:
        (tmp_path / "real.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_real(tmp_path / "real.json", names, 3)
