"""How CIFAR-10 and CIFAR-100 are laid out: names of files and folders, sizes, names of classes."""

from typing import NamedTuple

URL = "https://www.cs.toronto.edu/~kriz/"  # of the official archives
PIXELS = 3 * 32 * 32  # bytes of an image
# The official archives hold 185 MB each, in files of up to 156 MB. Anything far larger is not CIFAR, and is refused
# before it fills the memory.
MAX_BYTES = 512 * 2**20
OFFICIAL = "get the official file"  # the advice in many an error


class Layout(NamedTuple):
    """The names of one official form of a data set."""

    binary: bool  # or else pickled
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    class_names: str

    @property
    def archives(self):
        """The names that the archive may have: the official one, the same not compressed, zipped, ..."""
        stem = self.archive.removesuffix(".tar.gz")
        return (self.archive, *(stem + end for end in (".tgz", ".tar", ".zip", ".tar.bz2", ".tar.xz")))

    @property
    def image_files(self):
        """The files of the training images, and after them that of the test images."""
        return (*self.train, self.test)

    @property
    def files(self):
        """All files: those of images and that of the classes' names."""
        return (*self.image_files, self.class_names)


class Kind(NamedTuple):
    """What the forms of one data set have in common."""

    layouts: tuple[Layout, ...]
    md5: str  # of the first layout's archive
    label_bytes: int  # in a binary record; the last one is the label
    label_key: bytes  # in a pickled dictionary
    names_key: bytes
    class_names: str


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARY_BATCHES = tuple(f"{batch}.bin" for batch in _BATCHES)
KINDS = {
    "cifar10": Kind(
        layouts=(
            Layout(
                True, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", _BINARY_BATCHES, "test_batch.bin",
                "batches.meta.txt",
            ),
            Layout(False, "cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, "test_batch", "batches.meta"),
        ),
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        label_bytes=1,
        label_key=b"labels",
        names_key=b"label_names",
        class_names="airplane automobile bird cat deer dog frog horse ship truck",
    ),
    "cifar100": Kind(
        layouts=(
            Layout(
                True, "cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin", "fine_label_names.txt"
            ),
            Layout(False, "cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta"),
        ),
        md5="03b5dce01913d631647c71ecec9e9cb8",
        label_bytes=2,
        label_key=b"fine_labels",
        names_key=b"fine_label_names",
        class_names="""
            apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
            butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
            crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
            keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
            mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
            porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
            snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
            tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """,
    ),
}  # fmt: skip
