"""Matrix products through cuBLAS, called by ctypes.

CuPy's own products cannot be captured into a CUDA graph, copy transposed operands of more than two axes, and cannot
add onto their result. The library is the same one; only the call is ours.

cuBLAS thinks in columns: a row-major matrix read by columns is its transpose. C = A B is therefore asked for as
C^T = B^T A^T, with the operands in the other order, and no data are moved. An operand may be any view with one axis of
neighbouring numbers: x.T, or a head's slice of a packed (B, N, 3D) array.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_longlong, c_size_t, c_void_p

import numpy as np

from minivit.base.backend import array_module

TYPES = {"float32": 0, "uint16": 14}  # cudaDataType_t; uint16 arrays hold the bits of bfloat16, which NumPy lacks
COMPUTE = {"float32": 68, "tf32": 77}  # cublasComputeType_t: all 23 bits of the factors' mantissas, or 10 of them
DEFAULT_ALGORITHM = -1
WORKSPACE = 32 << 20  # bytes; what cuBLAS recommends for Hopper, and a graph needs one that stays where it is


def matrix_layout(x):
    """How cuBLAS reads the last two axes of an array: (1 if transposed else 0, leading dimension).

    Raises  ValueError: in neither of the two axes do the numbers lie side by side.
    """
    rows, columns = (stride // x.itemsize for stride in x.strides[-2:])
    if columns == 1 or x.shape[-1] == 1:
        return 0, max(rows, x.shape[-1])
    if rows == 1 or x.shape[-2] == 1:
        return 1, max(columns, x.shape[-2])
    raise ValueError(f"a matrix needs one axis of neighbouring numbers; the strides are {x.strides}")


class Cublas:
    """A cuBLAS handle.

    ``address(array)`` gives where an array begins; ``workspace`` is memory for the library's own use.
    Raises  OSError: there is no such library. RuntimeError: cuBLAS reports an error.
    """

    recordable = True  # into a CUDA graph

    def __init__(self, library, address, *, workspace=None):
        self._library, self._address, self._workspace = ctypes.CDLL(library), address, workspace
        lib, pointer = self._library, c_void_p
        matrix = [pointer, c_int, c_int]  # address, type, leading dimension
        batch = [*matrix, c_longlong]
        sizes = [pointer, c_int, c_int, c_int, c_int, c_int]
        lib.cublasCreate_v2.argtypes = [POINTER(pointer)]
        lib.cublasSetStream_v2.argtypes = [pointer, pointer]
        lib.cublasSetWorkspace_v2.argtypes = [pointer, pointer, c_size_t]
        lib.cublasGemmEx.argtypes = [*sizes, pointer, *matrix, *matrix, pointer, *matrix, c_int, c_int]
        lib.cublasGemmStridedBatchedEx.argtypes = [
            *sizes, pointer, *batch, *batch, pointer, *batch, c_int, c_int, c_int
        ]  # fmt: skip
        lib.cublasGemmBatchedEx.argtypes = [
            *sizes, pointer, *matrix, *matrix, pointer, *matrix, c_int, c_int, c_int
        ]  # fmt: skip
        self._handle = c_void_p()
        self._check(lib.cublasCreate_v2(byref(self._handle)))
        self._stream = None
        self.use_stream(0)

    def use_stream(self, stream):
        """Let the products run on a stream, given by its address."""
        if stream == self._stream:
            return
        self._check(self._library.cublasSetStream_v2(self._handle, stream))
        if (memory := self._workspace) is not None:  # after the stream, which takes the workspace away
            self._check(self._library.cublasSetWorkspace_v2(self._handle, self._address(memory), memory.nbytes))
        self._stream = stream

    @staticmethod
    def _check(status):
        if status:
            raise RuntimeError(f"cuBLAS returned status {status}")

    def matmul(self, a, b, out, *, alpha=1.0, add=False, compute="float32"):
        """out = alpha a b, or out += alpha a b.

        Shapes  a (m, k), b (k, n), out (m, n); with a batch axis before: (i, m, k), (i, k, n), (i, m, n)
        a and b are both float32 or both bfloat16 (as uint16), out may be either; ``compute`` concerns float32 factors.
        Raises  ValueError: shapes that do not fit, or an array without neighbouring numbers along one axis.
        """
        *batch, m, k = a.shape
        n = b.shape[-1]
        if b.shape != (*batch, k, n) or out.shape != (*batch, m, n) or len(batch) > 1:
            raise ValueError(f"cannot multiply {a.shape} by {b.shape} into {out.shape}")
        (ta, lda), (tb, ldb), (tc, ldc) = (matrix_layout(x) for x in (a, b, out))
        if tc:
            raise ValueError("the rows of the result must hold neighbouring numbers")
        al, be = c_float(alpha), c_float(float(add))
        A, B, C = ((self._address(x), TYPES[x.dtype.name], ld) for x, ld in ((a, lda), (b, ldb), (out, ldc)))
        head = (self._handle, tb, ta, n, m, k, byref(al))
        tail = (COMPUTE[compute if A[1] == 0 else "float32"], DEFAULT_ALGORITHM)
        if batch:
            sa, sb, sc = (x.strides[0] // x.itemsize for x in (a, b, out))
            product = self._library.cublasGemmStridedBatchedEx
            self._check(product(*head, *B, sb, *A, sa, byref(be), *C, sc, batch[0], *tail))
        else:
            self._check(self._library.cublasGemmEx(*head, *B, *A, byref(be), *C, *tail))

    def matmul_of_addresses(self, a, b, out, addresses, *, alpha=1.0, compute="float32"):
        """out = alpha a b for stacks of matrices (B, h, m, k), (B, h, k, n) and (B, h, m, n) in any strides.

        Shapes  addresses (3, B h) uint64 on the device: where the matrices of a, b and out begin
        """
        (m, k), n = a.shape[-2:], b.shape[-1]
        (ta, lda), (tb, ldb), (_, ldc) = (matrix_layout(x) for x in (a, b, out))
        al, be = c_float(alpha), c_float(0.0)
        start, step = self._address(addresses), addresses.strides[0]
        A, B, C = (
            (start + i * step, TYPES[x.dtype.name], ld) for i, (x, ld) in enumerate(((a, lda), (b, ldb), (out, ldc)))
        )
        tail = (addresses.shape[1], COMPUTE[compute if A[1] == 0 else "float32"], DEFAULT_ALGORITHM)
        self._check(
            self._library.cublasGemmBatchedEx(
                self._handle, tb, ta, n, m, k, byref(al), *B, *A, byref(be), *C, *tail
            )
        )  # fmt: skip


class ArrayProducts:
    """Stands for `Cublas` where the library cannot be loaded: the same products by the arrays' own ``matmul``.

    They are in float32 whatever is asked for; factors that are stored as bfloat16 are widened first.
    """

    recordable = False  # CuPy refuses its products while a graph is recorded

    def use_stream(self, stream):
        """Nothing: CuPy's products are on the stream in use."""

    def matmul(self, a, b, out, *, alpha=1.0, add=False, compute="float32"):
        """See `Cublas.matmul`."""
        product = array_module(a).matmul(_widened(a), _widened(b))
        if alpha != 1.0:
            product *= alpha
        if add:
            product += _widened(out)
        out[...] = product if out.dtype == np.float32 else _narrowed(product)

    def matmul_of_addresses(self, a, b, out, addresses, *, alpha=1.0, compute="float32"):
        """See `Cublas.matmul_of_addresses`."""
        self.matmul(a, b, out, alpha=alpha)


def _widened(x):
    """float32 numbers of an array that may hold bfloat16, their upper halves."""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrowed(x):
    """float32 rounded to bfloat16, ties to even; NaN stays one."""
    bits = x.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return array_module(x).where(x == x, bits, np.uint32(0x7FC0)).astype(np.uint16)
