/* cuBLAS on the CPU, float32 only: checks the order of the arguments, the leading dimensions and the batch steps. */
#include <stddef.h>

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

static void product(int ta, int tb, int m, int n, int k, float alpha, const float *A, int lda, const float *B, int ldb,
                    float beta, float *C, int ldc) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      double sum = 0;
      for (int p = 0; p < k; ++p) sum += (double)A[ta ? p + (size_t)i * lda : i + (size_t)p * lda] * B[tb ? j + (size_t)p * ldb : p + (size_t)j * ldb];
      float *c = &C[i + (size_t)j * ldc];
      *c = (float)(alpha * sum) + (beta != 0 ? beta * *c : 0);
    }
}

int cublasCreate_v2(void **handle) { return *handle = (void *)1, OK; }
int cublasSetStream_v2(void *handle, void *stream) { return handle ? OK : 1; }
int cublasSetWorkspace_v2(void *handle, void *memory, size_t bytes) { return handle && memory && bytes ? OK : INVALID_VALUE; }

int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const float *A,
                               int At, int lda, long long sa, const float *B, int Bt, int ldb, long long sb,
                               const float *beta, float *C, int Ct, int ldc, long long sc, int count, int compute,
                               int algorithm) {
  if (!handle || At || Bt || Ct || (compute != 68 && compute != 77) || algorithm != -1) return NOT_SUPPORTED;
  if (lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m || m < 1 || n < 1 || k < 1) return INVALID_VALUE;
  for (int i = 0; i < count; ++i)
    product(ta, tb, m, n, k, *alpha, A + i * sa, lda, B + i * sb, ldb, *beta, C + i * sc, ldc);
  return OK;
}

int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const float *A, int At, int lda,
                 const float *B, int Bt, int ldb, const float *beta, float *C, int Ct, int ldc, int compute,
                 int algorithm) {
  return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, A, At, lda, 0, B, Bt, ldb, 0, beta, C, Ct, ldc, 0,
                                    1, compute, algorithm);
}
