"""The command lines, one module each: ``minivit train`` is `minivit.commands.train`, and so is ``scripts/train.py``."""

COMMANDS = {  # by what people want to do
    "train a model and use it": {
        "train": "train a Vision Transformer, or go on where a run stopped",
        "evaluate": "accuracy, table by class and confusion matrix of a checkpoint",
        "predict": "the classes of images, and what the model attends to",
        "report": "a run as one HTML page",
        "sweep": "compare settings over seeds",
        "data": "download a data set, or describe one",
    },
    "study the gradients": {
        "gradcheck": "numerical against hand-written derivatives; plant a mistake and find it",
        "trace": "one batch in numbers, layer by layer",
        "visualize": "learning rates, curvature, augmentation, one image on its way through the model",
    },
    "start from other models": {
        "convert": "weights between minivit, the official files, timm and Hugging Face",
        "pretrain": "learn from images without labels",
        "transfer": "few-shot, linear probe and nearest neighbours on frozen features",
        "vtab": "the VTAB protocol with its 19 tasks",
    },
    "measure": {
        "benchmark": "time and memory of a step, against PyTorch, JAX and the matrix products alone",
        "paper": "the figures and tables of the ViT paper, made again",
    },
}
NAMES = [name for group in COMMANDS.values() for name in group]
