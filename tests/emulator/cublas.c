/* cuBLAS on the CPU, float32 and bfloat16: checks the order of the arguments, the leading dimensions, the batch steps and
   where the matrices of a list of addresses begin. */
#include <stddef.h>
#include <stdint.h>

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

static float get(const void *p, int type, size_t i) {
  if (type == 0) return ((const float *)p)[i];
  union { unsigned u; float f; } v = {(unsigned)((const unsigned short *)p)[i] << 16};
  return v.f;
}

/* A factor as it is multiplied: in TF32 with 10 bits of mantissa. */
static double factor(const void *p, int type, size_t i, int compute) {
  union { float f; unsigned u; } v = {get(p, type, i)};
  if (compute == 77) v.u = (v.u + 0x0FFF + (v.u >> 13 & 1)) & ~0x1FFFu;
  return v.f;
}

static void set(void *p, int type, size_t i, float x) {
  union { float f; unsigned u; } v = {x};
  if (type == 0) ((float *)p)[i] = x;
  else ((unsigned short *)p)[i] = (v.u + 0x7FFF + (v.u >> 16 & 1)) >> 16;
}

static int product(int ta, int tb, int m, int n, int k, float alpha, const void *A, int At, int lda, const void *B,
                   int Bt, int ldb, float beta, void *C, int Ct, int ldc, int compute, int algorithm) {
  if (At != Bt || (At != 0 && At != 14) || (Ct != 0 && Ct != 14) || (At == 0 && Ct != 0)) return NOT_SUPPORTED;
  if ((compute != 68 && !(compute == 77 && At == 0)) || algorithm != -1) return NOT_SUPPORTED;
  if (lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m || m < 1 || n < 1 || k < 1) return INVALID_VALUE;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      double sum = 0;
      for (int p = 0; p < k; ++p)
        sum += factor(A, At, ta ? p + (size_t)i * lda : i + (size_t)p * lda, compute) *
               factor(B, Bt, tb ? j + (size_t)p * ldb : p + (size_t)j * ldb, compute);
      const size_t c = i + (size_t)j * ldc;
      set(C, Ct, c, (float)(alpha * sum) + (beta != 0 ? beta * get(C, Ct, c) : 0));
    }
  return OK;
}

int cublasCreate_v2(void **handle) { return *handle = (void *)1, OK; }
int cublasSetStream_v2(void *handle, void *stream) { return handle ? OK : 1; }
int cublasSetWorkspace_v2(void *handle, void *memory, size_t bytes) { return handle && memory && bytes ? OK : INVALID_VALUE; }

int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const void *A, int At, int lda,
                 const void *B, int Bt, int ldb, const float *beta, void *C, int Ct, int ldc, int compute,
                 int algorithm) {
  return product(ta, tb, m, n, k, *alpha, A, At, lda, B, Bt, ldb, *beta, C, Ct, ldc, compute, algorithm);
}

int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const char *A,
                               int At, int lda, long long sa, const char *B, int Bt, int ldb, long long sb,
                               const float *beta, char *C, int Ct, int ldc, long long sc, int count, int compute,
                               int algorithm) {
  int status = OK;
  for (int i = 0; i < count && !status; ++i)
    status = product(ta, tb, m, n, k, *alpha, A + i * sa * (At ? 2 : 4), At, lda, B + i * sb * (Bt ? 2 : 4), Bt, ldb,
                     *beta, C + i * sc * (Ct ? 2 : 4), Ct, ldc, compute, algorithm);
  return status;
}

int cublasGemmBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const void *const *A,
                        int At, int lda, const void *const *B, int Bt, int ldb, const float *beta, void *const *C,
                        int Ct, int ldc, int count, int compute, int algorithm) {
  int status = OK;
  /* with factors of fewer than 23 bits each matrix must begin at a multiple of 16 bytes if k % 8 == 0, of 4 if k % 2 == 0 */
  const int multiple = At == 0 && compute == 68 ? 1 : k % 8 == 0 ? 16 : k % 2 == 0 ? 4 : 1;
  for (int i = 0; i < count; ++i)
    if (((uintptr_t)A[i] | (uintptr_t)B[i] | (uintptr_t)C[i]) % multiple) return NOT_SUPPORTED;
  for (int i = 0; i < count && !status; ++i)
    status = product(ta, tb, m, n, k, *alpha, A[i], At, lda, B[i], Bt, ldb, *beta, C[i], Ct, ldc, compute, algorithm);
  return status;
}
