"""The UCI handwritten digits, shipped with the package: a data set that is always there."""

from importlib import resources

import numpy as np

from minivit.data.dataset import Dataset


def load_digits():
    """Load the 1,797 handwritten digits: 1,437 to train on, 360 to test on.

    The split is fixed and stratified (each class keeps its share). It is random over images, so that both sides hold
    digits of the same writers: test accuracies are higher than they would be for new writers.

    Shapes  images (n, 8, 8, 1) uint8; the file's 0..16 are scaled to 0..255
    Source  E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
            1998, doi 10.24432/C50P49, CC BY 4.0; the 1,797 images of its test file.
    """
    file = resources.files("minivit.data").joinpath("digits.npz")
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        raw, labels, test = archive["images"], archive["labels"].astype(np.int64), archive["test"]
        source = f"{archive['source']}, {archive['license']}"
    images = ((raw.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)[..., None]  # (n, 8, 8, 1)
    return Dataset(
        "digits",
        images[~test],
        labels[~test],
        images[test],
        labels[test],
        tuple("0123456789"),
        source,
    )
