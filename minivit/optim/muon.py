r"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal.

For each matrix (n, k) of the blocks; everything else (embedding, head, biases, norms) is AdamW's:

    m     <- mu * m + g
    G     <- g + mu * m                          Nesterov's momentum: the step after this one, foreseen
    G      = U @ S @ V^T                         the singular value decomposition, of which S is left out:
    theta <- theta - eta * (0.2 * sqrt(max(n, k)) * U @ V^T + lambda * mask * theta)

Gradients of a matrix are nearly of low rank: a few directions hold nearly all of their length. With all singular
values at 1, rare directions are learned as quickly as frequent ones. The factor 0.2 * sqrt(max(n, k)) makes an entry
move about as far as under AdamW, so that both can share a learning rate (Liu et al. 2025, arXiv:2502.16982).

U @ V^T without the decomposition (Newton and Schulz): for X = U @ S @ V^T

    A         = X @ X^T = U @ S @ V^T @ V @ S @ U^T = U @ S^2 @ U^T,        since V^T @ V = 1,
    A @ X     = U @ S^2 @ U^T @ U @ S @ V^T = U @ S^3 @ V^T,              since U^T @ U = 1,
    A @ A @ X = U @ S^2 @ U^T @ U @ S^3 @ V^T = U @ S^5 @ V^T,    hence

    a * X + (b * A + c * A @ A) @ X = U @ (a * S + b * S^3 + c * S^5) @ V^T

Products of matrices apply the polynomial p(s) = a * s + b * s^3 + c * s^5 to each singular value s and leave U and V
alone. After a division by the matrix's length, all singular values lie in [0, 1]; p, applied five times, takes them
near 1:

    0.01 -> 0.034 -> 0.118 -> 0.400 -> 1.093 -> 0.699
    0.5  -> 1.189 -> 0.896 -> 0.824 -> 0.938 -> 0.765

That is near enough. Small values grow by the factor a at each step; a polynomial that ends at 1 exactly has a smaller
one.

The letters are explained in `minivit.optim.optimizer`.

Example: a matrix that stretches by 3 and by 4; its singular values become p(p(p(p(p(3/5))))) and p(p(p(p(p(4/5)))))
    >>> import numpy as np
    >>> orthogonalise(np.array([[0.0, 3.0], [4.0, 0.0]])).round(2).tolist()
    [[0.0, 0.72], [1.12, 0.0]]
    >>> a, b, c = NEWTON_SCHULZ
    >>> s = np.array([3.0, 4.0]) / 5
    >>> for _ in range(NEWTON_SCHULZ_STEPS):
    ...     s = a * s + b * s**3 + c * s**5
    >>> s.round(2).tolist()
    [0.72, 1.12]
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.optim.adam import AdamW
from minivit.optim.optimizer import pieces

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # a, b, c of the polynomial
NEWTON_SCHULZ_STEPS = 5


@accelerated
def orthogonalise(matrices):
    """The nearest matrices with orthonormal rows or columns, roughly: U @ V^T where M = U @ S @ V^T.

    Math    X = M / |M|;  five times  A = X @ X^T,  X <- a * X + (b * A + c * A @ A) @ X
    Shapes  (..., n, k)  ->  (..., n, k), with singular values between about 0.7 and 1.2
    """
    xp = array_module(matrices)
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if tall else matrices  # X @ X^T is smaller on the short side
    # X = M / |M|; the tiny number keeps 0 / 0 away
    x = x / (xp.sqrt((x * x).sum(axis=(-2, -1), keepdims=True)) + 1e-12)
    for _ in range(NEWTON_SCHULZ_STEPS):
        # A = X @ X^T
        gram = x @ x.swapaxes(-1, -2)
        # b * A + c * A @ A
        polynomial = gram @ gram
        polynomial *= c
        polynomial += b * gram
        # X <- a * X + (b * A + c * A @ A) @ X
        x = a * x + polynomial @ x
    return x.swapaxes(-1, -2) if tall else x


class Matrices(NamedTuple):
    """Matrices that `Muon` takes at once: those of one name in some blocks, which lie equally far apart.

    The blocks' parameters are all alike and lie one block after the other. The flat buffer from the first to the last
    of them is a table (depth, size of a block), and the matrices of a name are some of its columns.
    """

    blocks: slice  # all of the blocks' parameters in the flat buffer
    rows: slice  # which blocks
    columns: slice  # where in a block's parameters the matrices are
    shape: tuple  # (n, k count)
    count: int  # how many matrices (n, k) lie side by side


def one_by_one(function, items):
    """Call the function with each item in turn."""
    for item in items:
        function(item)


def split_parameters(flat, table):
    """The matrices of a model's blocks, and what is left of the flat buffer beside them.

    Returns  depth (the number of blocks), a list of `Matrices`, a list of slices that cover all other entries
    """
    inside = [i for i, spec in enumerate(table) if spec.name.startswith("blocks.")]
    if not inside:
        return 0, [], pieces(flat)
    ends = list(itertools.accumulate(spec.size for spec in table))
    starts = [0, *ends]
    first, last = starts[inside[0]], ends[inside[-1]]
    of_block = [i for i in inside if table[i].name.startswith("blocks.0.")]
    depth = len(inside) // len(of_block)
    size = (last - first) // depth  # entries of a block
    # on a GPU all blocks at once, where each launch counts; on the CPU one by one, so that threads can share them
    together = type(flat).__module__ != "numpy"
    rows = [slice(0, depth)] if together else [slice(i, i + 1) for i in range(depth)]
    names = [i for i in of_block if len(table[i].shape) == 2]
    matrices = [
        Matrices(
            slice(first, last), some, slice(starts[i] - first, ends[i] - first), table[i].shape,
            3 if table[i].name.endswith("qkv.weight") else 1,
        )
        for i in names
        for some in rows
    ]  # fmt: skip
    spans = [(starts[i] + j * size, ends[i] + j * size) for j in range(depth) for i in names]
    edges = [0, *(edge for span in spans for edge in span), flat.size]
    gaps = zip(edges[::2], edges[1::2], strict=True)  # what lies between the matrices
    return depth, matrices, [piece for start, stop in gaps for piece in pieces(flat, start, stop)]


class Muon(AdamW):
    """Momentum whose matrices are made orthogonal; what is no matrix of a block is AdamW's.

    ``table`` is the model's parameter table. The queries', keys' and values' matrices are each taken by themselves.
    ``each`` calls a function with each of ``matrices``; an engine's spreads them over its threads (see `Engine.each`).
    Shapes  flat, grad, decay_mask, scale, and the states "m" and "v": (n,); v is not used where Muon acts
    """

    def __init__(self, flat, decay_mask, *, table, momentum=0.95, **settings):
        AdamW.__init__(self, flat, decay_mask, **settings)
        self.momentum, self.each = momentum, one_by_one
        self.depth, self.matrices, self.others = split_parameters(flat, table)

    def step(self, flat, grad, lr):
        """Update the parameters in place from their gradient, which is left as it is; see `Optimizer.step`."""
        array_module(flat, grad)
        self.steps += 1
        for piece in self.others:
            self.update(flat, grad, lr, piece)
        self.update_matrices(flat, grad, lr)

    def update_matrices(self, flat, grad, lr):
        """Muon's part of a step; ``lr`` may be an array () on the device."""
        self.each(lambda matrices: self._update_matrices(flat, grad, lr, matrices), self.matrices)

    def _update_matrices(self, flat, grad, lr, matrices):
        """The equations above, for some of the matrices."""
        blocks, rows, columns, (n, width), count = matrices
        k = width // count

        def of(vector):
            """The matrices' entries (blocks, n k count), a view."""
            return vector[blocks].reshape(self.depth, -1)[rows, columns]

        theta, g, m = of(flat), of(grad), of(self.state["m"])
        # m <- mu * m + g
        m *= self.momentum
        m += g
        # G <- g + mu * m
        G = (g + self.momentum * m).reshape(-1, n, count, k).swapaxes(1, 2)  # (blocks, count, n, k)
        # U @ V^T, where G = U @ S @ V^T
        change = orthogonalise(G).swapaxes(1, 2).reshape(theta.shape)
        # theta <- theta - eta * (0.2 * sqrt(max(n, k)) * U @ V^T + lambda * mask * theta)
        rate = lr if self.scale is None else lr * of(self.scale)
        if self.weight_decay:
            theta -= rate * self.weight_decay * (of(self.decay_mask) * theta)
        change *= 0.2 * math.sqrt(max(n, k))
        change *= rate
        theta -= change
