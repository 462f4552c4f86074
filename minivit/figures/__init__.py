"""Every figure that minivit draws: one module per kind, all on one canvas.

from minivit import figures
figures.save_confusion("confusion.png", confusion, class_names)
"""

from minivit.figures import canvas  # first: it imports matplotlib, whatever MPLBACKEND says

# isort: split
from minivit.figures.attention import image_png, save_attention, save_distances, save_rollouts
from minivit.figures.compute import save_axial, save_compute, save_cost
from minivit.figures.contest import save_contest, save_data, save_layers, save_scaling
from minivit.figures.curvature import save_curvature
from minivit.figures.curves import save_curve, save_curves, save_lr_curve, save_masked_curves, training_label
from minivit.figures.embedding import save_filters, save_positions
from minivit.figures.network import save_trace
from minivit.figures.predictions import save_calibration, save_confusion, save_predictions
from minivit.figures.sheet import save_contact_sheet
from minivit.figures.sweep import save_few_shot, save_sweep, save_vtab
from minivit.figures.v_curves import save_v_curves

__all__ = [
    "canvas",
    "image_png",
    "save_attention",
    "save_axial",
    "save_calibration",
    "save_compute",
    "save_confusion",
    "save_contact_sheet",
    "save_contest",
    "save_cost",
    "save_curvature",
    "save_curve",
    "save_curves",
    "save_data",
    "save_distances",
    "save_few_shot",
    "save_filters",
    "save_layers",
    "save_lr_curve",
    "save_masked_curves",
    "save_positions",
    "save_predictions",
    "save_rollouts",
    "save_scaling",
    "save_sweep",
    "save_trace",
    "save_v_curves",
    "save_vtab",
    "training_label",
]
