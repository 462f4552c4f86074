// The hot steps of a Vision Transformer as CUDA kernels, each headed by the equation it computes.
//
// Arrays are row-major. A "row" is one token of one image: rows = B N. Nothing is summed with atomics: every
// sum has a fixed order, so the same inputs give the same bits. Sums over rows (gradients of biases and of LayerNorm's
// parameters) are made in two steps: each block writes the sums over its own rows, `add_partials` adds those up.
//
// Some sizes are constants at compile time, so that a row fits into registers and loops unroll:
//   WIDTH          D, a multiple of 4 up to 1024     (kernels over rows)
//   TOKENS, HEAD   N and Dh, a multiple of 4         (attention in float32)
//   TENSOR         with TOKENS, and HEAD 8, 16, 32, ...: attention on tensor cores, which round factors to TF32
//
// Activations are stored as `real`: float, or with BF16 defined bfloat16, the upper half of a float. Arithmetic is
// always that of float; parameters, their gradients, the residual stream z and its gradient dz are always stored so.
//
// "path" is stochastic depth's factor of each image, m / (1 - rate), or null where nothing is dropped. As
// path (g W + b) = (path g) W + path b, it scales the input of a branch's last product, which can then add its
// result straight onto the residual stream.

constexpr float LOWEST = -3.402823e38f;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

__device__ __forceinline__ float4 load4(const float* p, size_t quad) { return reinterpret_cast<const float4*>(p)[quad]; }
__device__ __forceinline__ void store4(float* p, size_t quad, float4 v) { reinterpret_cast<float4*>(p)[quad] = v; }
// Parameters lie anywhere in the flat buffer, at multiples of 4 bytes but not of 16: four reads, from the cache.
__device__ __forceinline__ float4 parameters4(const float* p, size_t quad) {
  p += 4 * quad;
  return make_float4(p[0], p[1], p[2], p[3]);
}
__device__ __forceinline__ float load1(const float* p, size_t i) { return p[i]; }
__device__ __forceinline__ void store1(float* p, size_t i, float v) { p[i] = v; }
__device__ __forceinline__ void store2(float* p, size_t pair, float a, float b) {
  p[2 * pair] = a;
  p[2 * pair + 1] = b;
}

#ifdef BF16
typedef unsigned short real;
__device__ __forceinline__ unsigned rounded(float v) {  // to the nearest bfloat16, ties to even
  const unsigned bits = __float_as_uint(v);
  return v == v ? (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16 : 0x7FC0u;  // of a GPU's NaN, 0x7FFFFFFF, it would make -0
}
__device__ __forceinline__ float load1(const real* p, size_t i) { return __uint_as_float((unsigned)p[i] << 16); }
__device__ __forceinline__ void store1(real* p, size_t i, float v) { p[i] = (real)rounded(v); }
__device__ __forceinline__ float4 load4(const real* p, size_t quad) {
  const uint2 v = reinterpret_cast<const uint2*>(p)[quad];
  return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000u), __uint_as_float(v.y << 16),
                     __uint_as_float(v.y & 0xFFFF0000u));
}
__device__ __forceinline__ void store4(real* p, size_t quad, float4 v) {
  reinterpret_cast<uint2*>(p)[quad] = make_uint2(rounded(v.x) | rounded(v.y) << 16, rounded(v.z) | rounded(v.w) << 16);
}
__device__ __forceinline__ void store2(real* p, size_t pair, float a, float b) {
  reinterpret_cast<unsigned*>(p)[pair] = rounded(a) | rounded(b) << 16;
}
#else
typedef float real;
#endif
__device__ __forceinline__ float sum4(float4 a) { return (a.x + a.y) + (a.z + a.w); }
__device__ __forceinline__ float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ __forceinline__ float4 operator-(float4 a, float4 b) { return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w); }
__device__ __forceinline__ float4 operator*(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ __forceinline__ float4 operator*(float s, float4 a) { return make_float4(s * a.x, s * a.y, s * a.z, s * a.w); }
__device__ __forceinline__ float4 operator-(float4 a, float s) { return make_float4(a.x - s, a.y - s, a.z - s, a.w - s); }

#ifdef WIDTH
constexpr int QUADS = WIDTH / 4, PER_LANE = (QUADS + 31) / 32, WARPS = 8;

// LayerNorm, one warp per row, with the residual addition before it where there is one (u given):
//     z' = z + u + path1 bu;   xhat = (z' - mean) / sqrt(var + eps);   y = xhat w + b;   out = z' + path2 bnext
// out is the residual stream as the next product needs it, which adds its result onto it.
extern "C" __global__ void layernorm_forward(
    const float* __restrict__ z, const real* __restrict__ u, const float* __restrict__ bu,
    const float* __restrict__ path1, const float* __restrict__ bnext, const float* __restrict__ path2,
    const float* __restrict__ w, const float* __restrict__ b, float* __restrict__ out, real* __restrict__ y,
    real* __restrict__ xhat, float* __restrict__ rstd, int rows, int tokens, float eps) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const float s1 = path1 ? path1[row / tokens] : 1.f, s2 = path2 ? path2[row / tokens] : 1.f;
  const size_t start = (size_t)row * QUADS;
  float4 v[PER_LANE];
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) {
    const int q = lane + 32 * k;
    if (q < QUADS) {
      v[k] = load4(z, start + q);
      if (u) {
        v[k] = v[k] + load4(u, start + q) + s1 * parameters4(bu, q);
        store4(out, start + q, v[k] + s2 * parameters4(bnext, q));
      }
      sum += sum4(v[k]);
    }
  }
  const float mean = warp_sum(sum) / WIDTH;
  float squares = 0.f;
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k)
    if (lane + 32 * k < QUADS) {
      v[k] = v[k] - mean;
      squares += sum4(v[k] * v[k]);
    }
  const float r = rsqrtf(warp_sum(squares) / WIDTH + eps);
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) {
    const int q = lane + 32 * k;
    if (q < QUADS) {
      v[k] = r * v[k];
      store4(xhat, start + q, v[k]);
      store4(y, start + q, v[k] * parameters4(w, q) + parameters4(b, q));
    }
  }
  if (lane == 0) rstd[row] = r;
}

// Backward of LayerNorm, and the residual's gradient added (dres, may be null). With dxhat = dy w:
//     dz = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) + dres,   and its copy as `real` for products (may be null)
// and over this block's rows: partial (blocks, 3, D) = sum dy xhat, sum dy, sum path dz.
extern "C" __global__ void layernorm_backward(
    const real* __restrict__ dy, const real* __restrict__ xhat, const float* __restrict__ rstd,
    const float* __restrict__ w, const float* dres, const float* __restrict__ path, float* dz, real* copy,
    float* __restrict__ partial, int rows, int tokens) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float4 sums[3][PER_LANE];
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) sums[0][k] = sums[1][k] = sums[2][k] = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int row = blockIdx.x * WARPS + warp; row < rows; row += gridDim.x * WARPS) {
    const size_t start = (size_t)row * QUADS;
    const float s = path ? path[row / tokens] : 1.f, r = rstd[row];
    float4 x[PER_LANE], d[PER_LANE];
    float mean = 0.f, along = 0.f;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
      const int q = lane + 32 * k;
      if (q < QUADS) {
        x[k] = load4(xhat, start + q);
        d[k] = load4(dy, start + q);
        sums[0][k] = sums[0][k] + d[k] * x[k];
        sums[1][k] = sums[1][k] + d[k];
        d[k] = d[k] * parameters4(w, q);  // dxhat
        mean += sum4(d[k]);
        along += sum4(d[k] * x[k]);
      }
    }
    mean = warp_sum(mean) / WIDTH;
    along = warp_sum(along) / WIDTH;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
      const int q = lane + 32 * k;
      if (q < QUADS) {
        float4 g = r * ((d[k] - mean) - along * x[k]);
        if (dres) g = g + load4(dres, start + q);
        store4(dz, start + q, g);
        if (copy) store4(copy, start + q, g);
        sums[2][k] = sums[2][k] + s * g;
      }
    }
  }
  __shared__ float4 all[WARPS][QUADS];
  for (int j = 0; j < 3; ++j) {
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k)
      if (lane + 32 * k < QUADS) all[warp][lane + 32 * k] = sums[j][k];
    __syncthreads();
    for (int q = threadIdx.x; q < QUADS; q += blockDim.x) {
      float4 total = all[0][q];
      for (int i = 1; i < WARPS; ++i) total = total + all[i][q];
      store4(partial, ((size_t)blockIdx.x * 3 + j) * QUADS + q, total);
    }
    __syncthreads();
  }
}
#endif  // WIDTH

#ifdef ROWS
// partial (chunks, cols) = sum over the rows of each chunk of path x: the gradient of a bias, in part.
// Blocks of 32 columns x 8 rows; grid (cols / 32, chunks).
template <class T>
__device__ __forceinline__ void sum_columns(const T* __restrict__ x, const float* __restrict__ path,
                                            real* __restrict__ copy, float* __restrict__ partial, int rows, int cols,
                                            int tokens) {
  const int c = blockIdx.x * 32 + threadIdx.x;
  float sum = 0.f;
  if (c < cols)
    for (int row = blockIdx.y * 8 + threadIdx.y; row < rows; row += gridDim.y * 8) {
      const float v = load1(x, (size_t)row * cols + c);
      if (copy) store1(copy, (size_t)row * cols + c, v);
      sum += (path ? path[row / tokens] : 1.f) * v;
    }
  __shared__ float all[8][32];
  all[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < cols) {
    for (int i = 1; i < 8; ++i) sum += all[i][threadIdx.x];
    partial[(size_t)blockIdx.y * cols + c] = sum;
  }
}

extern "C" __global__ void column_sum(const real* __restrict__ x, const float* __restrict__ path,
                                      float* __restrict__ partial, int rows, int cols, int tokens) {
  sum_columns(x, path, (real*)nullptr, partial, rows, cols, tokens);
}

// The same for a gradient stored as float, with its copy as `real` for the products that come next.
extern "C" __global__ void column_sum_copy(const float* __restrict__ x, const float* __restrict__ path,
                                           real* __restrict__ copy, float* __restrict__ partial, int rows, int cols,
                                           int tokens) {
  sum_columns(x, path, copy, partial, rows, cols, tokens);
}

// copy = x, rounded to `real`: the parameters as the products take them.
extern "C" __global__ void round_copy(const float* __restrict__ x, real* __restrict__ copy, size_t size) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x)
    store1(copy, i, x[i]);
}

// out_j[c] += sum over chunks of partial[chunk][j cols + c], for the outputs given (null ones are left out).
// Blocks of 32 columns x 16 chunks; grid (cols / 32, number of outputs).
extern "C" __global__ void add_partials(const float* __restrict__ partial, float* __restrict__ out0,
                                        float* __restrict__ out1, float* __restrict__ out2, int chunks, int cols) {
  float* out = blockIdx.y == 0 ? out0 : blockIdx.y == 1 ? out1 : out2;
  if (!out) return;
  const int c = blockIdx.x * 32 + threadIdx.x;
  float sum = 0.f;
  if (c < cols)
    for (int i = threadIdx.y; i < chunks; i += 16) sum += partial[((size_t)i * gridDim.y + blockIdx.y) * cols + c];
  __shared__ float all[16][32];
  all[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < cols) {
    for (int i = 1; i < 16; ++i) sum += all[i][threadIdx.x];
    out[c] += sum;
  }
}

// x += b, the bias of a linear layer.
extern "C" __global__ void add_bias(real* __restrict__ x, const float* __restrict__ b, size_t size, int cols) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x)
    store1(x, i, load1(x, i) + b[i % cols]);
}

constexpr float SQRT_2_OVER_PI = 0.7978845608028654f, CUBIC = 0.044715f, SQRT_HALF = 0.7071067811865476f,
                INV_SQRT_2PI = 0.3989422804014327f;

// GELU and its slope, from x with the bias added. With s the gate:
//     tanh form  s = sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3);   y = x s,   y' = s + x s (1 - s) 2 u'
//     erf form   s = Phi(x);                                            y = x s,   y' = s + x phi(x)
// (1 + tanh u) / 2 = sigmoid(2 u) is the same number without the cancellation at large negative u.
__device__ __forceinline__ float gate(float x, int erf_form) {
  if (erf_form) return 0.5f * erfcf(-SQRT_HALF * x);
  return 1.f / (1.f + __expf(-2.f * SQRT_2_OVER_PI * x * (1.f + CUBIC * x * x)));
}
__device__ __forceinline__ float slope(float x, int erf_form) {
  const float s = gate(x, erf_form);
  if (erf_form) return s + x * INV_SQRT_2PI * __expf(-0.5f * x * x);
  return s + x * s * (1.f - s) * 2.f * SQRT_2_OVER_PI * (1.f + 3.f * CUBIC * x * x);
}

// y = path gelu(h + b), h (rows, cols) with cols a multiple of 4.
extern "C" __global__ void bias_gelu_forward(const real* __restrict__ h, const float* __restrict__ b,
                                             const float* __restrict__ path, real* __restrict__ y, int rows, int cols,
                                             int tokens, int erf_form) {
  const int quads = cols / 4;
  const size_t size = (size_t)rows * quads;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x) {
    const int row = i / quads;
    const float4 x = load4(h, i) + parameters4(b, i - (size_t)row * quads);
    const float s = path ? path[row / tokens] : 1.f;
    store4(y, i, s * make_float4(x.x * gate(x.x, erf_form), x.y * gate(x.y, erf_form), x.z * gate(x.z, erf_form),
                                 x.w * gate(x.w, erf_form)));
  }
}

// dh = path dy gelu'(h + b), and partial (chunks, cols) = sum of dh over each chunk's rows. dh may be dy.
// Blocks of 32 groups of four columns x 8 rows; grid (cols / 128, chunks).
extern "C" __global__ void bias_gelu_backward(const real* __restrict__ h, const float* __restrict__ b,
                                              const float* __restrict__ path, const real* dy, real* dh,
                                              float* __restrict__ partial, int rows, int cols, int tokens,
                                              int erf_form) {
  const int quads = cols / 4, q = blockIdx.x * 32 + threadIdx.x;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if (q < quads) {
    const float4 bias = parameters4(b, q);
    for (int row = blockIdx.y * 8 + threadIdx.y; row < rows; row += gridDim.y * 8) {
      const size_t i = (size_t)row * quads + q;
      const float4 x = load4(h, i) + bias;
      const float s = path ? path[row / tokens] : 1.f;
      const float4 g = s * load4(dy, i) * make_float4(slope(x.x, erf_form), slope(x.y, erf_form),
                                                      slope(x.z, erf_form), slope(x.w, erf_form));
      store4(dh, i, g);
      sum = sum + g;
    }
  }
  __shared__ float4 all[8][32];
  all[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && q < quads) {
    for (int i = 1; i < 8; ++i) sum = sum + all[i][threadIdx.x];
    store4(partial, (size_t)blockIdx.y * quads + q, sum);
  }
}

// Softmax of each row of n scores, rows `stride` apart, one warp per row; p may be the scores. Stochastic depth's factor, constant over the
// `group` rows of an image, is put in here: path (p v) = (path p) v.
//     p = path exp(s - max s) / sum exp(s - max s)
extern "C" __global__ void softmax_forward(const float* scores, real* p, const float* __restrict__ path, int rows, int n,
                                           int stride, int group) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const float* s = scores + (size_t)row * stride;
  float largest = LOWEST, sum = 0.f;
  for (int j = lane; j < n; j += 32) largest = fmaxf(largest, s[j]);
  largest = warp_max(largest);
  for (int j = lane; j < n; j += 32) sum += __expf(s[j] - largest);
  const float scale = (path ? path[row / group] : 1.f) / warp_sum(sum);
  for (int j = lane; j < n; j += 32) store1(p, (size_t)row * stride + j, scale * __expf(s[j] - largest));
}

// Backward of softmax with the scores' factor, one warp per row; ds may be dp. p holds stochastic depth's factor, so
// that the softmax itself is p / path.
//     ds = scale p (dp - sum_j dp_j p_j / path), and 0 where path is 0
extern "C" __global__ void softmax_backward(const real* __restrict__ p, const float* dp, const float* __restrict__ path,
                                            real* ds, float scale, int rows, int n, int stride, int group) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const size_t start = (size_t)row * stride;
  float dot = 0.f;
  for (int j = lane; j < n; j += 32) dot += load1(p, start + j) * dp[start + j];
  const float factor = path ? path[row / group] : 1.f;
  dot = factor > 0.f ? warp_sum(dot) / factor : 0.f;
  for (int j = lane; j < n; j += 32) store1(ds, start + j, scale * load1(p, start + j) * (dp[start + j] - dot));
}

// Softmax cross-entropy of each row, one warp per row.
//     p = softmax(x);   w = sum_k t_k;   loss = w logsumexp(x) - sum_k t_k x_k
extern "C" __global__ void cross_entropy_forward(const float* __restrict__ x, const float* __restrict__ t,
                                                 float* __restrict__ p, float* __restrict__ weight,
                                                 float* __restrict__ loss, int rows, int K) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const size_t start = (size_t)row * K;
  float largest = LOWEST, sum = 0.f, w = 0.f, dot = 0.f;
  for (int k = lane; k < K; k += 32) largest = fmaxf(largest, x[start + k]);
  largest = warp_max(largest);
  for (int k = lane; k < K; k += 32) {
    const float shifted = x[start + k] - largest, e = expf(shifted);
    p[start + k] = e;
    sum += e;
    w += t[start + k];
    dot += t[start + k] * shifted;
  }
  sum = warp_sum(sum), w = warp_sum(w), dot = warp_sum(dot);
  for (int k = lane; k < K; k += 32) p[start + k] /= sum;
  if (lane == 0) weight[row] = w, loss[row] = w * logf(sum) - dot;
}

// Its backward: dx = factor (w p - t), with factor the loss's gradient over the number of images.
extern "C" __global__ void cross_entropy_backward(const float* __restrict__ p, const float* __restrict__ t,
                                                  const float* __restrict__ weight, float* __restrict__ dx,
                                                  float factor, int size, int K) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x)
    dx[i] = factor * (weight[i / K] * p[i] - t[i]);
}

// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random words for a counter
// c and a key k, the same whoever asks and whenever. Ten rounds, each with the next key k + i (0x9E3779B9, 0xBB67AE85):
//     c <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
__device__ __forceinline__ void philox(unsigned (&c)[4], unsigned k0, unsigned k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned long long m0 = 0xD2511F53ull * c[0], m1 = 0xCD9E8D57ull * c[2];
    c[0] = (unsigned)(m1 >> 32) ^ c[1] ^ k0;
    c[1] = (unsigned)m1;
    c[2] = (unsigned)(m0 >> 32) ^ c[3] ^ k1;
    c[3] = (unsigned)m0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Dropout and its backward, which are the same linear map: y = m x / (1 - rate), m_i = [u_i >= rate]. The uniform number
// u_i is word i mod 4 of counter i / 4, its upper 24 bits; so the mask is never stored. y may be x.
extern "C" __global__ void dropout(const float* x, const size_t* __restrict__ key, float* y, float rate, float scale,
                                   size_t size) {
  const unsigned k0 = (unsigned)key[0], k1 = (unsigned)(key[0] >> 32);
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; 4 * i < size; i += (size_t)gridDim.x * blockDim.x) {
    unsigned c[4] = {(unsigned)i, (unsigned)(i >> 32), 0u, 0u};
    philox(c, k0, k1);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const size_t j = 4 * i + e;
      if (j < size) y[j] = (float)(c[e] >> 8) * 5.9604644775390625e-8f >= rate ? scale * x[j] : 0.f;  // 2^-24
    }
  }
}

// Where the matrices of stacks (B, h) of three operands begin, given where the stacks begin and their strides in bytes.
extern "C" __global__ void matrix_addresses(size_t a, size_t b, size_t c, int a0, int a1, int b0, int b1, int c0, int c1,
                                            int heads, int count, size_t* __restrict__ out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const size_t image = i / heads, head = i % heads;
  out[i] = a + image * a0 + head * a1;
  out[count + i] = b + image * b0 + head * b1;
  out[2 * (size_t)count + i] = c + image * c0 + head * c1;
}

__device__ __forceinline__ float scaled(float pixel) { return pixel; }
__device__ __forceinline__ float scaled(unsigned char pixel) { return ((float)pixel - 127.5f) / 127.5f; }

// Patches of images, with rows of zeros for the class token so that products over all tokens can be taken; bytes are
// scaled to (x - 127.5) / 127.5.
//     images (B, H, W, C)  ->  patches (B, prefix + H/P W/P, P P C), entries in the order (row, column, channel)
template <typename Pixel>
__device__ __forceinline__ void cut_patches(const Pixel* __restrict__ images, real* __restrict__ patches, int B, int H,
                                            int W, int C, int P, int prefix) {
  const int width = P * P * C, tokens = prefix + (H / P) * (W / P);
  const size_t size = (size_t)B * tokens * width;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x) {
    const int e = i % width, token = i / width % tokens - prefix, image = i / width / tokens;
    const int y = token / (W / P) * P + e / (P * C), x = token % (W / P) * P + e / C % P;
    store1(patches, i, token < 0 ? 0.f : scaled(images[(((size_t)image * H + y) * W + x) * C + e % C]));
  }
}

extern "C" __global__ void patchify(const float* __restrict__ images, real* __restrict__ patches, int B, int H, int W,
                                    int C, int P, int prefix) {
  cut_patches(images, patches, B, H, W, C, P, prefix);
}

extern "C" __global__ void patchify_bytes(const unsigned char* __restrict__ images, real* __restrict__ patches, int B,
                                          int H, int W, int C, int P, int prefix) {
  cut_patches(images, patches, B, H, W, C, P, prefix);
}

// z = patches E with what belongs to each token added (Eq. 1):
//     z_bn += position_n + (n < prefix ? cls_token : bias);   position may be null
extern "C" __global__ void embed(float* __restrict__ z, const float* __restrict__ bias, const float* __restrict__ cls,
                                 const float* __restrict__ position, int B, int tokens, int D, int prefix) {
  const size_t size = (size_t)B * tokens * D;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x) {
    const int d = i % D, n = i / D % tokens;
    z[i] += (n < prefix ? cls[d] : bias[d]) + (position ? position[n * D + d] : 0.f);
  }
}

// partial (blocks) = sums of g^2: the squared norm of the gradient, in part.
extern "C" __global__ void sum_squares(const float* __restrict__ g, float* __restrict__ partial, size_t size) {
  float sum = 0.f;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x)
    sum += g[i] * g[i];
  __shared__ float all[8];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 8; ++i) sum += all[i];
    partial[blockIdx.x] = sum;
  }
}

// norm = sqrt(sum of partial), one warp.
extern "C" __global__ void norm_of_partials(const float* __restrict__ partial, float* __restrict__ norm, int blocks) {
  float sum = 0.f;
  for (int i = threadIdx.x; i < blocks; i += 32) sum += partial[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) *norm = sqrtf(sum);
}

// Adam (decoupled = 0) or AdamW (1) over the flat buffers, with the gradient clipped to max_norm (0: not at all):
//     g <- g min(1, max_norm / norm);   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
//     theta <- theta - lr m / ((1 - b1^t) (sqrt(v / (1 - b2^t)) + eps)),   with lambda c theta in g, or lr lambda c theta
// What changes from step to step is in device memory, hyper = (lr, 1 - b1^t, sqrt(1 - b2^t)): a replayed graph reads it.
extern "C" __global__ void adam(float* __restrict__ theta, const float* __restrict__ grad, float* __restrict__ m,
                                float* __restrict__ v, const float* __restrict__ mask, const float* __restrict__ norm,
                                const float* __restrict__ hyper, float b1, float b2, float eps, float decay,
                                float max_norm, int decoupled, size_t size) {
  const float lr = hyper[0], c1 = hyper[1], c2 = hyper[2];
  const float clip = max_norm > 0.f ? fminf(1.f, max_norm / (*norm + 1e-12f)) : 1.f;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x) {
    float p = theta[i], g = clip * grad[i];
    if (decoupled) p -= lr * decay * mask[i] * p;
    else g += decay * mask[i] * p;
    const float mi = b1 * m[i] + (1.f - b1) * g, vi = b2 * v[i] + (1.f - b2) * g * g;
    m[i] = mi;
    v[i] = vi;
    theta[i] = p - lr / c1 * mi / (sqrtf(vi) / c2 + eps);
  }
}

// Training images of a batch, gathered from the whole set in uint8, moved by a random crop and mirrored:
//     out[b, y, x] = images[index_b, y + down_b - padding, x' + right_b - padding],  x' = mirrored_b ? W - 1 - x : x
// where what lies outside is 0.
extern "C" __global__ void crop_flip(const unsigned char* __restrict__ images, const int* __restrict__ index,
                                     const int* __restrict__ down, const int* __restrict__ right,
                                     const int* __restrict__ mirrored, unsigned char* __restrict__ out, int B, int H,
                                     int W, int C, int padding) {
  const size_t size = (size_t)B * H * W;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x) {
    const int b = i / W / H;
    int x = i % W, y = i / W % H + down[b] - padding;
    x = (mirrored[b] ? W - 1 - x : x) + right[b] - padding;
    const bool inside = 0 <= x && x < W && 0 <= y && y < H;
    for (int c = 0; c < C; ++c)
      out[i * C + c] = inside ? images[(((size_t)index[b] * H + y) * W + x) * C + c] : (unsigned char)0;
  }
}
#endif  // ROWS

#if defined(TOKENS) && !defined(TENSOR)
// Attention of one head of one image, in one block: everything between the products with U_qkv and U_msa stays in
// shared memory. qkv (B, N, 3, h, Dh) is the product without its bias.
//     q, k, v = qkv + bqkv;   p = softmax(q k^T / sqrt(Dh));   y = path p v
// Threads own tiles of 4 x 4 results; operands lie in rows padded by four, so that neighbouring rows are in other banks.
constexpr int TILES = (TOKENS + 3) / 4, PADDED = 4 * TILES, ROW = HEAD + 4, KEYS = PADDED + 4, HQUADS = HEAD / 4;

// Reads slice `which` (0: q, 1: k, 2: v) of a head into rows of shared memory; rows beyond the last token are zero.
__device__ __forceinline__ void load_head(const real* __restrict__ x, const float* __restrict__ bias, float scale,
                                          int stride, float* rows) {
  for (int i = threadIdx.x; i < PADDED * HQUADS; i += blockDim.x) {
    const int n = i / HQUADS, q = i % HQUADS;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (n < TOKENS) {
      v = load4(x + (size_t)n * stride, q);
      if (bias) v = v + parameters4(bias, q);
      v = scale * v;
    }
    *reinterpret_cast<float4*>(rows + n * ROW + 4 * q) = v;
  }
}

// s[i][j] = scale sum_d a[i][d] b[j][d]; rows i, j of a thread lie TILES apart, so that a warp reads neighbouring ones.
__device__ __forceinline__ void rows_times_rows(const float* a, const float* b, float scale, float* s) {
  for (int t = threadIdx.x; t < TILES * TILES; t += blockDim.x) {
    const int i0 = t / TILES, j0 = t % TILES;
    float sum[4][4] = {};
#pragma unroll 4
    for (int d = 0; d < HEAD; d += 4) {
      float4 x[4], y[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        x[r] = *reinterpret_cast<const float4*>(a + (i0 + r * TILES) * ROW + d);
        y[r] = *reinterpret_cast<const float4*>(b + (j0 + r * TILES) * ROW + d);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          sum[r][c] += x[r].x * y[c].x + x[r].y * y[c].y + x[r].z * y[c].z + x[r].w * y[c].w;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) s[(i0 + r * TILES) * KEYS + j0 + c * TILES] = scale * sum[r][c];
  }
}

// out[i][d] = scale sum_j s[i][j] b[j][d], to global rows of `stride`.
__device__ __forceinline__ void scores_times_rows(const float* s, const float* b, float scale, real* __restrict__ out,
                                                  int stride) {
  for (int t = threadIdx.x; t < TILES * HQUADS; t += blockDim.x) {
    const int i0 = t / HQUADS, d = 4 * (t % HQUADS);
    float4 sum[4] = {};
#pragma unroll 2
    for (int j = 0; j < PADDED; j += 4) {
      float4 y[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) y[c] = *reinterpret_cast<const float4*>(b + (j + c) * ROW + d);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float4 x = *reinterpret_cast<const float4*>(s + (i0 + r * TILES) * KEYS + j);
        sum[r] = sum[r] + x.x * y[0] + x.y * y[1] + x.z * y[2] + x.w * y[3];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (i0 + r * TILES < TOKENS)
        store4(out + (size_t)(i0 + r * TILES) * stride, d / 4, scale * sum[r]);
  }
}

// out[j][d] = scale sum_i s[i][j] a[i][d], to global rows of `stride`.
__device__ __forceinline__ void scores_transposed_times_rows(const float* s, const float* a, float scale,
                                                             real* __restrict__ out, int stride) {
  for (int t = threadIdx.x; t < TILES * HQUADS; t += blockDim.x) {
    const int j0 = 4 * (t / HQUADS), d = 4 * (t % HQUADS);
    float4 sum[4] = {};
#pragma unroll 4
    for (int i = 0; i < TOKENS; ++i) {
      const float4 x = *reinterpret_cast<const float4*>(s + i * KEYS + j0), y = *reinterpret_cast<const float4*>(a + i * ROW + d);
      sum[0] = sum[0] + x.x * y;
      sum[1] = sum[1] + x.y * y;
      sum[2] = sum[2] + x.z * y;
      sum[3] = sum[3] + x.w * y;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (j0 + r < TOKENS) store4(out + (size_t)(j0 + r) * stride, d / 4, scale * sum[r]);
  }
}

// Softmax of the rows of scores in shared memory, one warp per row; columns beyond the last token become zero.
__device__ __forceinline__ void softmax_rows(float* s) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < PADDED; i += blockDim.x / 32) {
    float* row = s + i * KEYS;
    float largest = LOWEST, sum = 0.f;
    for (int j = lane; j < TOKENS; j += 32) largest = fmaxf(largest, row[j]);
    largest = warp_max(largest);
    for (int j = lane; j < PADDED; j += 32) {
      const float e = j < TOKENS ? __expf(row[j] - largest) : 0.f;
      row[j] = e;
      sum += e;
    }
    const float scale = 1.f / warp_sum(sum);
    for (int j = lane; j < TOKENS; j += 32) row[j] *= scale;
  }
}

extern "C" __global__ void attention_forward(const real* __restrict__ qkv, const float* __restrict__ bias,
                                             const float* __restrict__ path, real* __restrict__ y, int heads) {
  extern __shared__ float shared[];
  float *q = shared, *k = q + PADDED * ROW, *v = k + PADDED * ROW, *s = v + PADDED * ROW;
  const int image = blockIdx.x / heads, head = blockIdx.x % heads, D = heads * HEAD;
  const real* x = qkv + (size_t)image * TOKENS * 3 * D + head * HEAD;
  const float* b = bias + head * HEAD;
  load_head(x, b, 1.f, 3 * D, q);
  load_head(x + D, b + D, 1.f, 3 * D, k);
  load_head(x + 2 * D, b + 2 * D, 1.f, 3 * D, v);
  __syncthreads();
  rows_times_rows(q, k, rsqrtf((float)HEAD), s);
  __syncthreads();
  softmax_rows(s);
  __syncthreads();
  scores_times_rows(s, v, path ? path[image] : 1.f, y + (size_t)image * TOKENS * D + head * HEAD, D);
}

// Backward of the whole of it; p is made again from q and k.
//     dv = p^T dy;   dp = dy v^T;   ds = p (dp - rowsum(dp p)) / sqrt(Dh);   dq = ds k;   dk = ds^T q     (dy <- path dy)
extern "C" __global__ void attention_backward(const real* __restrict__ qkv, const float* __restrict__ bias,
                                              const float* __restrict__ path, const real* __restrict__ dy,
                                              real* __restrict__ dqkv, int heads) {
  extern __shared__ float shared[];
  float *q = shared, *k = q + PADDED * ROW, *v = k + PADDED * ROW, *d = v + PADDED * ROW, *p = d + PADDED * ROW,
        *ds = p + PADDED * KEYS;
  const int image = blockIdx.x / heads, head = blockIdx.x % heads, D = heads * HEAD, lane = threadIdx.x % 32;
  const size_t at = (size_t)image * TOKENS * 3 * D + head * HEAD;
  const float* b = bias + head * HEAD;
  load_head(qkv + at, b, 1.f, 3 * D, q);
  load_head(qkv + at + D, b + D, 1.f, 3 * D, k);
  load_head(qkv + at + 2 * D, b + 2 * D, 1.f, 3 * D, v);
  load_head(dy + (size_t)image * TOKENS * D + head * HEAD, nullptr, path ? path[image] : 1.f, D, d);
  __syncthreads();
  rows_times_rows(q, k, rsqrtf((float)HEAD), p);
  rows_times_rows(d, v, 1.f, ds);  // dp
  __syncthreads();
  softmax_rows(p);
  __syncthreads();
  scores_transposed_times_rows(p, d, 1.f, dqkv + at + 2 * D, 3 * D);  // dv
  for (int i = threadIdx.x / 32; i < PADDED; i += blockDim.x / 32) {
    float *a = p + i * KEYS, *g = ds + i * KEYS, dot = 0.f;
    for (int j = lane; j < TOKENS; j += 32) dot += a[j] * g[j];
    dot = warp_sum(dot);
    for (int j = lane; j < PADDED; j += 32) g[j] = j < TOKENS ? rsqrtf((float)HEAD) * a[j] * (g[j] - dot) : 0.f;
  }
  __syncthreads();
  scores_times_rows(ds, k, 1.f, dqkv + at, 3 * D);                     // dq
  scores_transposed_times_rows(ds, q, 1.f, dqkv + at + D, 3 * D);      // dk
}
#endif  // TOKENS without TENSOR

#ifdef TENSOR
// Attention of one head of one image, in one block, on tensor cores. A warp multiplies tiles
//     c (16 x 8) += a (16 x 8) b (8 x 8)
// that its lanes hold together: with g = lane / 4 and t = lane % 4, a lane has a[g][t], a[g + 8][t], a[g][t + 4],
// a[g + 8][t + 4]; b[t][g], b[t + 4][g]; c[g][2t], c[g][2t + 1], c[g + 8][2t], c[g + 8][2t + 1].
//
// The result of one product is the left factor of the next (p of y = p v) without moving: where the product sums over k,
// any order of k will do, so that columns 2t, 2t + 1 of c serve as k = t, t + 4, and the right factor's rows are read
// in the same order. What a warp makes of its 16 rows therefore never leaves its registers.
#ifndef EMULATED
__device__ __forceinline__ float to_tf32(float v) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  const unsigned *x = reinterpret_cast<const unsigned*>(a), *y = reinterpret_cast<const unsigned*>(b);
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
}
#endif

constexpr int TILES = (TOKENS + 15) / 16, ROWS16 = 16 * TILES, STRIDE = HEAD + 4, DTILES = HEAD / 8,
              KTILES = (TOKENS + 7) / 8, CHUNK = KTILES <= 12 ? KTILES : 8;
constexpr float LOG2E = 1.4426950408889634f;

// The left factor: rows i0 ... i0 + 15 and columns d0 ... d0 + 7 of an array in shared memory.
__device__ __forceinline__ void left(float (&a)[4], const float* x, int i0, int d0) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const float* p = x + (i0 + g) * STRIDE + d0 + t;
  a[0] = p[0], a[1] = p[8 * STRIDE], a[2] = p[4], a[3] = p[8 * STRIDE + 4];
}
// The right factor x^T: its columns are the rows j0 ... j0 + 7 of x.
__device__ __forceinline__ void right_transposed(float (&b)[2], const float* x, int j0, int d0) {
  const float* p = x + (j0 + threadIdx.x % 32 / 4) * STRIDE + d0 + threadIdx.x % 4;
  b[0] = p[0], b[1] = p[4];
}
// The right factor x: its rows are the rows k0 ... k0 + 7 of x in the order of c's columns.
__device__ __forceinline__ void right(float (&b)[2], const float* x, int k0, int d0) {
  const float* p = x + (k0 + 2 * (threadIdx.x % 4)) * STRIDE + d0 + threadIdx.x % 32 / 4;
  b[0] = p[0], b[1] = p[STRIDE];
}
// A result as a left factor.
__device__ __forceinline__ void left_of(float (&a)[4], const float (&c)[4]) {
  a[0] = to_tf32(c[0]), a[1] = to_tf32(c[2]), a[2] = to_tf32(c[1]), a[3] = to_tf32(c[3]);
}

constexpr int THREADS = 32 * TILES, QUADS = HEAD / 4, LOADS = ROWS16 * QUADS / THREADS,  // quads for each thread
              FLIGHT = THREADS > 256 && LOADS > 4 ? 4 : LOADS,  // of these at a time: 128 registers must hold them
              BLOCKS = TILES <= 6 ? 2 : 1,  // at once on a multiprocessor, for the compiler to count registers
              BACKWARD_BLOCKS = HEAD <= 64 ? BLOCKS : 1;  // two would not fit into shared memory

static_assert(LOADS % FLIGHT == 0);

// A slice of a packed array into rows of shared memory, with its bias and factor; rows beyond the last token are zero.
// A batch of FLIGHT loads is on its way before its first one is waited for. With `other` given, delta_n = sum_d x_nd other_nd.
__device__ __forceinline__ void load_rows(float* rows, const real* __restrict__ x, const float* __restrict__ bias,
                                          float factor, int stride, const real* __restrict__ other = nullptr,
                                          float* delta = nullptr) {
#pragma unroll 1
  for (int first = 0; first < LOADS; first += FLIGHT) {
    float4 v[FLIGHT], w[FLIGHT];
#pragma unroll
    for (int r = 0; r < FLIGHT; ++r) {
      const unsigned at = threadIdx.x + (first + r) * THREADS;
      const int n = at / QUADS, q = at % QUADS;
      v[r] = w[r] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (n < TOKENS) {
        v[r] = load4(x + (size_t)n * stride, q);
        if (other) w[r] = load4(other + (size_t)n * stride, q);
      }
    }
#pragma unroll
    for (int r = 0; r < FLIGHT; ++r) {
      const unsigned at = threadIdx.x + (first + r) * THREADS;
      const int n = at / QUADS, q = at % QUADS;
      if (other) {
        float dot = sum4(v[r] * w[r]);  // of a quad; a row's are in neighbouring lanes
#pragma unroll
        for (int o = QUADS / 2; o > 0; o >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, o);
        if (q == 0) delta[n] = dot;
      }
      if (bias && n < TOKENS) v[r] = v[r] + parameters4(bias, q);
      const float4 u = factor * v[r];
      *reinterpret_cast<float4*>(rows + n * STRIDE + 4 * q) =
          make_float4(to_tf32(u.x), to_tf32(u.y), to_tf32(u.z), to_tf32(u.w));
    }
  }
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// y = path softmax(q k^T / sqrt(Dh)) v, and of each row log2 sum_j 2^(score_j log2 e), from which the backward makes p
// again. A warp has 16 queries and goes through the keys in chunks; with m the largest score so far, l the sum and
// o the weighted values, both relative to m, a larger maximum m' scales what is there by 2^(m - m').
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_forward(const real* __restrict__ qkv, const float* __restrict__ bias, const float* __restrict__ path,
                  real* __restrict__ y, float* __restrict__ logsum, int heads) {
  extern __shared__ float shared[];
  float *k = shared, *v = k + ROWS16 * STRIDE;
  const int image = blockIdx.x / heads, head = blockIdx.x % heads, D = heads * HEAD;
  const real* x = qkv + (size_t)image * TOKENS * 3 * D + head * HEAD;
  const float* b = bias + head * HEAD;
  load_rows(k, x + D, b + D, 1.f, 3 * D);
  load_rows(v, x + 2 * D, b + 2 * D, 1.f, 3 * D);
  const int i0 = 16 * (threadIdx.x / 32), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float q[DTILES][4];
#pragma unroll
  for (int d = 0; d < DTILES; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = i0 + g + 8 * (e % 2), c = 8 * d + t + 4 * (e / 2);
      q[d][e] = i < TOKENS ? to_tf32(load1(x, (size_t)i * 3 * D + c) + b[c]) : 0.f;
    }
  __syncthreads();
  float o[DTILES][4] = {}, m[2] = {LOWEST, LOWEST}, l[2] = {0.f, 0.f};
  for (int first = 0; first < KTILES; first += CHUNK) {
    float s[CHUNK][4] = {};
#pragma unroll
    for (int n = 0; n < CHUNK; ++n)
      if (first + n < KTILES)
#pragma unroll
        for (int d = 0; d < DTILES; ++d) {
          float kt[2];
          right_transposed(kt, k, 8 * (first + n), 8 * d);
          multiply_add(s[n], q[d], kt);
        }
    float largest[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < CHUNK; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = 8 * (first + n) + 2 * t + e % 2 < TOKENS ? s[n][e] * (LOG2E * rsqrtf((float)HEAD)) : LOWEST;
        largest[e / 2] = fmaxf(largest[e / 2], s[n][e]);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = quad_max(largest[r]);
      const float shrink = exp2f(m[r] - largest[r]);
      m[r] = largest[r];
      l[r] *= shrink;
#pragma unroll
      for (int d = 0; d < DTILES; ++d) o[d][2 * r] *= shrink, o[d][2 * r + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < CHUNK; ++n)
      if (first + n < KTILES) {
        float p[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[n][e] = exp2f(s[n][e] - m[e / 2]);
          l[e / 2] += s[n][e];
        }
        left_of(p, s[n]);
#pragma unroll
        for (int d = 0; d < DTILES; ++d) {
          float vt[2];
          right(vt, v, 8 * (first + n), 8 * d);
          multiply_add(o[d], p, vt);
        }
      }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = i0 + g + 8 * r;
    const float sum = quad_sum(l[r]), factor = (path ? path[image] : 1.f) / sum;
    if (i >= TOKENS) continue;
    real* out = y + ((size_t)image * TOKENS + i) * D + head * HEAD;
#pragma unroll
    for (int d = 0; d < DTILES; ++d) store2(out, 4 * d + t, factor * o[d][2 * r], factor * o[d][2 * r + 1]);
    if (t == 0) logsum[(size_t)blockIdx.x * TOKENS + i] = m[r] + log2f(sum);
  }
}

// Backward of the whole of it. With p = 2^(s log2 e - logsum) made again and delta_i = sum_d dy_id y_id, which is
// sum_j p_ij dp_ij,
//     dv = p^T dy;   dp = dy v^T;   ds = p (dp - delta) / sqrt(Dh);   dq = ds k;   dk = ds^T q     (dy <- path dy)
// First a warp has 16 keys and goes through the queries (dk and dv are sums over queries), then 16 queries and goes
// through the keys (dq is a sum over keys): each sum stays in one warp, in a fixed order.
extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
attention_backward(const real* __restrict__ qkv, const float* __restrict__ bias, const float* __restrict__ path,
                   const real* __restrict__ y, const float* __restrict__ logsum, const real* __restrict__ dy,
                   real* __restrict__ dqkv, int heads) {
  extern __shared__ float shared[];
  constexpr int SIZE = ROWS16 * STRIDE;
  float *q = shared, *k = q + SIZE, *v = k + SIZE, *d_y = v + SIZE, *delta = d_y + SIZE, *log_sum = delta + ROWS16;
  const int image = blockIdx.x / heads, head = blockIdx.x % heads, D = heads * HEAD;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const size_t packed = (size_t)image * TOKENS * 3 * D + head * HEAD;
  const size_t plain = (size_t)image * TOKENS * D + head * HEAD;
  const float* b = bias + head * HEAD;
  const float scale = rsqrtf((float)HEAD);
  load_rows(q, qkv + packed, b, 1.f, 3 * D);
  load_rows(k, qkv + packed + D, b + D, 1.f, 3 * D);
  load_rows(v, qkv + packed + 2 * D, b + 2 * D, 1.f, 3 * D);
  load_rows(d_y, dy + plain, nullptr, path ? path[image] : 1.f, D, y + plain, delta);
  for (int i = threadIdx.x; i < ROWS16; i += THREADS)
    log_sum[i] = i < TOKENS ? logsum[(size_t)blockIdx.x * TOKENS + i] : -LOWEST;  // p = 0
  __syncthreads();
  const int mine = 16 * (threadIdx.x / 32);  // this warp's rows
  {
    float dk[DTILES][4] = {}, dv[DTILES][4] = {};
    for (int i0 = 0; i0 < ROWS16; i0 += 16) {
      float p[2][4] = {}, ds[2][4] = {};
#pragma unroll
      for (int d = 0; d < DTILES; ++d) {
        float keys[4], values[4], other[2];
        left(keys, k, mine, 8 * d);
        left(values, v, mine, 8 * d);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          right_transposed(other, q, i0 + 8 * u, 8 * d);
          multiply_add(p[u], keys, other);
          right_transposed(other, d_y, i0 + 8 * u, 8 * d);
          multiply_add(ds[u], values, other);
        }
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = i0 + 8 * u + 2 * t + e % 2;
          p[u][e] = exp2f(p[u][e] * (LOG2E * scale) - log_sum[i]);
          ds[u][e] = p[u][e] * (ds[u][e] - delta[i]) * scale;
        }
        float pt[4], dst[4], other[2];
        left_of(pt, p[u]);
        left_of(dst, ds[u]);
#pragma unroll
        for (int d = 0; d < DTILES; ++d) {
          right(other, d_y, i0 + 8 * u, 8 * d);
          multiply_add(dv[d], pt, other);
          right(other, q, i0 + 8 * u, 8 * d);
          multiply_add(dk[d], dst, other);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int j = mine + g + 8 * r;
      if (j >= TOKENS) continue;
      real* out = dqkv + packed + (size_t)j * 3 * D;
#pragma unroll
      for (int d = 0; d < DTILES; ++d) {
        store2(out + D, 4 * d + t, dk[d][2 * r], dk[d][2 * r + 1]);
        store2(out + 2 * D, 4 * d + t, dv[d][2 * r], dv[d][2 * r + 1]);
      }
    }
  }
  float dq[DTILES][4] = {};
  for (int j0 = 0; j0 < ROWS16; j0 += 16) {
    float p[2][4] = {}, ds[2][4] = {};
#pragma unroll
    for (int d = 0; d < DTILES; ++d) {
      float queries[4], d_out[4], other[2];
      left(queries, q, mine, 8 * d);
      left(d_out, d_y, mine, 8 * d);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        right_transposed(other, k, j0 + 8 * u, 8 * d);
        multiply_add(p[u], queries, other);
        right_transposed(other, v, j0 + 8 * u, 8 * d);
        multiply_add(ds[u], d_out, other);
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = mine + g + 8 * (e / 2), j = j0 + 8 * u + 2 * t + e % 2;
        const float weight = exp2f(p[u][e] * (LOG2E * scale) - log_sum[i]);
        ds[u][e] = j < TOKENS ? weight * (ds[u][e] - delta[i]) * scale : 0.f;
      }
      float dst[4], other[2];
      left_of(dst, ds[u]);
#pragma unroll
      for (int d = 0; d < DTILES; ++d) {
        right(other, k, j0 + 8 * u, 8 * d);
        multiply_add(dq[d], dst, other);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = mine + g + 8 * r;
    if (i >= TOKENS) continue;
#pragma unroll
    for (int d = 0; d < DTILES; ++d)
      store2(dqkv + packed + (size_t)i * 3 * D, 4 * d + t, dq[d][2 * r], dq[d][2 * r + 1]);
  }
}
#endif  // TENSOR
