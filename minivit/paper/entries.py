"""The figures and tables of the ViT paper that are made again, at a scale that a laptop bears.

`ENTRIES` lists them: which figure or table of the paper each mirrors, what differs from it, and the function that makes
it. That function takes a `context.Context`, writes its figures into the context's folder and returns a
`context.Result`: what a page says of them. `minivit.paper.page` remembers and shows them.
"""

from __future__ import annotations

from minivit.base.errors import InputError
from minivit.paper.context import Entry
from minivit.paper.of_a_model import (
    IMAGES,
    make_cost,
    make_distance,
    make_few_shot,
    make_filters,
    make_positions,
    make_rollout,
)
from minivit.paper.of_trainings import (
    make_axial,
    make_fine_tuning,
    make_hybrid,
    make_masked,
    make_self_supervision,
    make_sweep,
    make_targets,
)


def sweep_entry(name, mirrors, title, differs):
    """The entry of a sweep in minivit/configs/sweeps."""
    return Entry(name, mirrors, title, differs, "training", 0, lambda context: make_sweep(context, name, title))


SMALL = "a small model of small images; the paper's are large ones, pre-trained on millions of images"
SCRATCH = "trained from nothing on small images for a few epochs, one seed; the paper tests few-shot after pre-training"
ENTRIES = (
    Entry("filters", "Fig. 7, left", "Filters of the patch embedding", SMALL + "; RGB, 28 components as there",
          "a model", 2, make_filters),
    Entry("positions", "Fig. 7, centre; Fig. 10", "Similarity of position embeddings", SMALL, "a model", 2,
          make_positions),
    Entry("distance", "Fig. 7, right; Fig. 11", "Mean attention distance",
          SMALL + f"; {IMAGES} images as there; attention to the class token is left out", "a model", 10,
          make_distance),
    Entry("rollout", "Fig. 6, Fig. 14", "Attention from the output to the image",
          SMALL + "; a map's light runs from its least to its largest value", "a model", 5, make_rollout),
    Entry("cost", "Fig. 12", "Speed and memory by size of model and image",
          "this machine's processor, where the paper has a TPU core; peak memory, where the paper has the largest "
          "batch that fits: micro-batches keep ours from growing with the batch", "nothing", 150, make_cost),
    Entry("fewshot", "Fig. 4", "Few-shot accuracy of frozen features",
          SMALL + "; against examples of each class, where the paper varies the size of the pre-training set; and the "
          "model was trained with all labels of the very same data, which is no transfer",
          "a model", 60, make_few_shot),
    Entry("masked", "Section 4.6", "Masked patch prediction",
          "pre-trained on small images within the budget, where the paper has B/16 and JFT", "training", 0,
          make_masked, 3.0),
    Entry("selfsupervision", "Section 4.6", "Pre-training without labels, then fine-tuning",
          "pre-trained and fine-tuned on the same small images within the budget; the paper has JFT and ImageNet",
          "training", 0, make_self_supervision, 6.0),
    Entry("targets", "Appendix B.1.2", "What masked patch prediction predicts",
          "pre-trained and fine-tuned on the same small images within the budget; the paper has JFT, and compares "
          "few-shot accuracies", "training", 0, make_targets, 5.0),
    Entry("finetuning", "Section 3.2, B.1.1", "Fine-tuning, also at a higher resolution",
          "from five classes of small images to the other five, as they are and at 48 pixels; the paper goes "
          "from 224 to 384",
          "training", 0, make_fine_tuning),
    Entry("paper-hybrid", "Fig. 5, Section 3.1", "ViTs and hybrids by compute",
          SCRATCH + "; stems of the root, or of it and one unit, with 16 channels, where the paper has a ResNet-50; "
          "the paper has ResNets alone too", "training", 0, make_hybrid),
    sweep_entry("paper-datasize", "Fig. 3, Fig. 4", "Size of the training set",
                "trained from nothing on shares of one small data set, for as many steps each, one seed; the paper "
                "pre-trains on up to 300 million images, and tunes the regularisation of the smaller sets"),
    sweep_entry("paper-head", "Section 3.1, D.3", "Head with and without a hidden layer",
                SCRATCH + "; the paper has the hidden layer in pre-training alone, and no table of it"),
    sweep_entry("paper-optimizer", "Table 7", "SGD and Adam",
                "a ViT " + SCRATCH + "; the paper compares them for ResNets"),
    sweep_entry("paper-shape", "Fig. 8", "Depth, width, MLP and patch size", SCRATCH),
    sweep_entry("paper-pooling", "Fig. 9", "Class token or mean, by learning rate", SCRATCH),
    sweep_entry("paper-table8", "Table 8", "Position embeddings", SCRATCH),
    Entry("paper-axial", "Fig. 13", "Axial attention: accuracy, compute and speed",
          SCRATCH + ", on a TPU core where this is a processor, and has an AxialResNet too; the mean is classified in "
          "place of a class token; grids of 4 x 4 and 8 x 8 patches leave axial attention little to save",
          "training", 0, make_axial),
)  # fmt: skip

ABSENT = (
    "Accuracies of pre-training on ImageNet, ImageNet-21k and JFT (Tables 2, 5 and 6; Fig. 3 to 5 at their scale): the "
    "settings of Tables 3 and 4 are in minivit/configs/paper-*.toml, the data and the machines are not here",
    "VTAB (Fig. 2, Table 9): `minivit vtab` has its protocol and its 19 tasks, whose images are to be supplied",
    "ImageNet-ReaL (Table 2): `minivit evaluate --real` has its metric; ObjectNet (D.9) has no code of its own",
    "ResNets by themselves (Fig. 3 to 5, Table 6) and the AxialResNet (Fig. 13): a ResNet is here only the stem of a "
    "hybrid",
    "The axes of Fig. 12 that a TPU gives: the largest batch that fits, speeds of one core",
)


def entry_of(name):
    """The entry of a name.

    Raises  InputError: there is none; the message lists them.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    raise InputError(f"no figure {name!r}; there are {', '.join(entry.name for entry in ENTRIES)}")
