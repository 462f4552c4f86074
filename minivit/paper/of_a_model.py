"""The paper's figures of a model that is trained already, and of models that need no training."""

from __future__ import annotations

import numpy as np

from minivit import figures
from minivit.base.files import write_json
from minivit.base.finite import quiet_overflow
from minivit.evaluation.features import transfer_results, transfer_stem
from minivit.evaluation.inference import check_finite, load_with_data
from minivit.layers.softmax import softmax_forward
from minivit.model import ViTConfig
from minivit.paper import analyses
from minivit.paper.context import Result
from minivit.training.engines.cut import available_cores

IMAGES = 128  # test images whose attention is measured
COST_MODELS, COST_SIZES = ("Ti/16", "S/16", "B/32", "B/16"), (64, 128, 192, 256)


def make_filters(context):
    """Fig. 7, left."""
    model, _ = context.subject
    c = model.config
    filters = analyses.filters(model.params["patch_embed.proj.weight"], c.patch_size)
    path = context.figure("filters")
    figures.save_filters(path, filters, title=f"patch embedding: {context.description}")
    return Result(
        (path.name,),
        f"The first {len(filters.shares)} principal components of the {c.width} filters, scaled each by itself, with "
        f"their share of the variance: together {filters.shares.sum():.0%}.",
    )


def make_positions(context):
    """Fig. 7, centre."""
    model, _ = context.subject
    similarity = analyses.position_similarity(analyses.position_embedding(model))
    g = model.config.grid_size
    near = np.mean([similarity[r, c, r, c + 1] for r in range(g) for c in range(g - 1)]) if g > 1 else 1.0
    path = context.figure("positions")
    figures.save_positions(path, similarity, kind=model.config.pos_embed, title=context.description)
    return Result(
        (path.name,),
        "Each small map is the cosine similarity of one patch's position embedding to those of all patches. "
        f"Neighbours in a row: {near:.2f} on average; all pairs: {similarity.mean():.2f}.",
    )


def make_distance(context):
    """Fig. 7, right; Fig. 11."""
    model, dataset = context.subject
    images = dataset.test_images[context.test_rows(IMAGES)]
    with quiet_overflow():
        distances = analyses.head_distances(model, images)
    check_finite(distances, context.checkpoint())
    c = model.config
    uniform = analyses.patch_distances(c.grid_size, c.image_size / c.grid_size).mean()
    path = context.figure("distance")
    figures.save_distances(path, distances, uniform=uniform, images=len(images), title=context.description)
    first, last = distances[0], distances[-1]
    return Result(
        (path.name,),
        f"How far the heads look: from {first.min():.1f} to {first.max():.1f} pixels in the first block, from "
        f"{last.min():.1f} to {last.max():.1f} in the last.",
    )


def make_rollout(context):
    """Fig. 6 and 14."""
    _, dataset = context.subject
    images, labels, answer = context.answers
    probabilities, _ = softmax_forward(np.asarray(answer.logits, np.float64))
    guesses = probabilities.argmax(axis=1)
    titles = [(f"{dataset.class_names[k]} {p[k]:.0%}", k == truth)
              for k, p, truth in zip(guesses, probabilities, labels, strict=True)]  # fmt: skip
    path = context.figure("rollout")
    figures.save_rollouts(path, images, answer.maps[-1], titles, title=context.description)
    right = int((guesses == labels).sum())
    return Result(
        (path.name,),
        f"{len(images)} test images drawn at random, each beside itself in the light of its attention rollout: the "
        "patch that counts least is darkest, the one that counts most (so many times as much) is brightest. "
        f"{right} are classified correctly.",
    )


def make_few_shot(context):
    """Fig. 4."""
    path, folder = context.checkpoint(), context.out / "fewshot"
    folder.mkdir(parents=True, exist_ok=True)
    model, record, dataset = load_with_data(path, **context.analysed, other_classes=True)
    results = transfer_results(path, model, record, dataset, untrained=True, pixels=True, device=context.device)
    stem = transfer_stem("fewshot", dataset)
    write_json(folder / f"{stem}.json", results)
    figures.save_few_shot(folder / f"{stem}.png", results, title=f"{path.parent.name}, few-shot on {dataset.name}")
    return Result(
        (f"fewshot/{stem}.png",),
        "Regularised least squares on frozen features from a few examples of each class, three draws of them: of the "
        "trained model, of the same one untrained, and of the pixels themselves.",
    )


def make_cost(context):
    """Fig. 12."""
    models = {name: ViTConfig.preset(name) for name in COST_MODELS}
    points = analyses.cost(models, COST_SIZES, context.speed, progress=context.progress)
    path = context.figure("cost")
    figures.save_cost(path, points, title=f"{available_cores()} cores, float32")
    write_json(context.out / "cost.json", points)
    lines = ["| model | pixels | tokens | predictions/s | training images/s | peak memory of each, MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for infer, step in zip(points[::2], points[1::2], strict=True):
        memory = ", ".join(f"{p['peak_memory'] / 2**20:,.0f}" if p["peak_memory"] else "?" for p in (infer, step))
        lines.append(
            f"| {infer['model']} | {infer['size']} | {infer['tokens']} | {infer['images_per_second']:.3g} | "
            f"{step['images_per_second']:.3g} | {memory} |"
        )
    batch = points[0]["batch"]
    caption = f"Images per second on {available_cores()} cores, and peak memory, in batches of {batch}, float32."
    return Result((path.name,), caption, "\n".join(lines))
