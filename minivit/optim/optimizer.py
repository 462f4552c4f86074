r"""What every optimiser shares: its settings, its state, the count of its steps, and the pieces it works in.

The letters of this package, in every file:

    theta    the parameters, one flat vector (n,)
    g        the gradient of the loss by them (n,)
    eta      the learning rate of the step: ``lr``, times ``scale`` where each entry has a rate of its own
    lambda   the weight decay
    mask     the decay mask (n,): 1 for matrices, 0 for biases, LayerNorms, tokens and positions
    t        the number of the step, counted from 1
    mu, b1, b2, eps    settings of the optimiser, numbers

Products of vectors are elementwise, written ``*`` in the equations as in the code; ``<-`` overwrites.

An optimiser is its settings, its state vectors and its count of steps. A subclass names its vectors and writes its
equations in ``update(flat, grad, lr, piece)``, which is called for one piece of the entries after the other: every
entry is worked on by itself.
"""

from __future__ import annotations

from minivit.base.backend import array_module

PIECE = 16384  # entries: five float32 vectors of this length fit into an L2 cache of 512 KiB


def pieces(flat, start=0, stop=None):
    """Slices that cover a flat vector, or a part of it.

    On the CPU they are short: an update reads its vectors several times, and a short piece of them stays in the
    processor's cache. On a GPU there is one, since each operation on each piece would be a launch.
    """
    stop = flat.size if stop is None else stop
    length = PIECE if type(flat).__module__ == "numpy" else max(stop, 1)
    return [slice(i, min(i + length, stop)) for i in range(start, stop, length)]


class Optimizer:
    """An update of the parameters from their gradient, with its state.

    ``vectors`` are the names of the state vectors, which begin at zero.
    ``scale``, if given, is a factor of the learning rate for each entry.
    Shapes  flat, decay_mask, scale, and each vector of ``state``: (n,)
    """

    vectors = ()

    def __init__(self, flat, decay_mask, *, weight_decay=0.0, scale=None):
        xp = array_module(flat)
        self.weight_decay, self.decay_mask, self.scale = weight_decay, decay_mask, scale
        self.state = {name: xp.zeros_like(flat) for name in self.vectors}
        self.steps = 0

    def step(self, flat, grad, lr):
        """Update the parameters in place from their gradient, which is left as it is.

        Shapes  flat, grad (n,), lr a number
        Raises  TypeError: not NumPy or CuPy arrays, or one of each.
        """
        array_module(flat, grad)
        self.steps += 1
        for piece in pieces(flat):
            self.update(flat, grad, lr, piece)

    def rate(self, lr, piece):
        """eta for a piece of the entries: a number, or a vector where each entry has a rate of its own."""
        return lr if self.scale is None else lr * self.scale[piece]
