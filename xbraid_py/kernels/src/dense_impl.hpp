// The dense step and its adjoint, for whatever instruction set this is compiled. Defines `XBRAID_TABLE`, with vectors of
// `XBRAID_BYTES` bytes and register tiles of 4 rows by `XBRAID_COLUMNS` for the gradients; see product.hpp for the rest.
//
// Shape letters: B samples of the batch, n of them in a block, I inputs, O outputs. A row is one feature of all samples.

#include "flat.hpp"
#include "loss.hpp"
#include "product.hpp"

namespace {

// ---- The gradient d x^T, summed over samples. Every entry is a vector of partial sums in memory, reduced at the end.

template <int R, int C, class T>
inline void outer(const T* d, long d_stride, const T* x, long x_stride, long n, T* sums, long sums_stride) {
  constexpr int L = XBRAID_BYTES / sizeof(T);
  typedef typename VectorOf<T, L>::type V;
  V sum[R][C];
  XBRAID_UNROLL for (int r = 0; r < R; r++)
    XBRAID_UNROLL for (int c = 0; c < C; c++) sum[r][c] = load<V>(sums + r * sums_stride + c * L);
  const auto add = [&](long at, const auto& place) {
    V xs[C];
    XBRAID_UNROLL for (int c = 0; c < C; c++) xs[c] = place.from(x + c * x_stride + at, 0);
    XBRAID_UNROLL for (int r = 0; r < R; r++) {
      const V left = place.from(d + r * d_stride + at, 0);
      XBRAID_UNROLL for (int c = 0; c < C; c++) sum[r][c] = fused(left, xs[c], sum[r][c]);
    }
  };
  long at = 0;
  for (; at + L <= n; at += L) add(at, Whole<V, 1>());
  if (at < n) add(at, Ending<V, 1>{n - at});
  XBRAID_UNROLL for (int r = 0; r < R; r++)
    XBRAID_UNROLL for (int c = 0; c < C; c++) store(sums + r * sums_stride + c * L, sum[r][c]);
}

template <int R, class T>
inline void outer_row(int inputs, const T* d, const T* x, long x_stride, long n, T* sums) {
  constexpr int L = XBRAID_BYTES / sizeof(T);
  const long stride = long(inputs) * L;
  int i = 0;
  for (; i + XBRAID_COLUMNS <= inputs; i += XBRAID_COLUMNS)
    outer<R, XBRAID_COLUMNS>(d, BLOCK, x + i * x_stride, x_stride, n, sums + i * L, stride);
  for (; i < inputs; i++) outer<R, 1>(d, BLOCK, x + i * x_stride, x_stride, n, sums + i * L, stride);
}

// The sums: O x I vectors for W, then O vectors for b.
template <class T>
void add_gradient(const Layer& layer, const T* d, const T* x, long x_stride, long n, T* sums) {
  constexpr int L = XBRAID_BYTES / sizeof(T);
  typedef typename VectorOf<T, L>::type V;
  const int O = layer.outputs, I = layer.inputs;
  int o = 0;
  for (; o + 4 <= O; o += 4) outer_row<4>(I, d + o * BLOCK, x, x_stride, n, sums + long(o) * I * L);
  for (; o < O; o++) outer_row<1>(I, d + o * BLOCK, x, x_stride, n, sums + long(o) * I * L);
  T* bias = sums + long(O) * I * L;
  for (o = 0; o < O; o++) {
    V sum = load<V>(bias + o * L);
    long at = 0;
    for (; at + L <= n; at += L) sum += load<V>(d + o * BLOCK + at);
    if (at < n) sum += load_some<V>(d + o * BLOCK + at, n - at);
    store(bias + o * L, sum);
  }
}

template <class T>
void write_gradient(const Layer& layer, T h, const T* sums, T* gradient) {
  constexpr int L = XBRAID_BYTES / sizeof(T);
  const int O = layer.outputs, split = O * layer.inputs;
  for (int i = 0; i < split; i++) gradient[i] = h * reduced(sums + long(i) * L);
  if (layer.scalar_bias) gradient[split] = 0;
  for (int o = 0; o < O; o++) {
    const T sum = h * reduced(sums + long(split + o) * L);
    if (layer.scalar_bias)
      gradient[split] += sum;
    else
      gradient[split + o] = sum;
  }
}

// ---- Whole steps, block by block of samples.

template <class T, template <class> class A>
void step_as(const Layer& layer, long B, T h, const T* theta, const T* u, const T* add, T* out, T* scratch) {
  const Packed<T> w = forward_weights<T, A>(layer, theta, scratch + layer.outputs * BLOCK);
  // A second tile of rows would still read what the first has overwritten.
  const bool one_tile = w.rows <= XBRAID_ROWS && (w.rows & (w.rows - 1)) == 0;
  const bool staged = !layer.midpoint && out == u && !one_tile;
  for (long at = 0; at < B; at += BLOCK) {
    const long n = B - at < BLOCK ? B - at : BLOCK;
    const T* x = u + at;
    long x_stride = B;
    if (layer.midpoint) {
      product(w, x, B, n, Value<T, A>{h / 2, x, B, nullptr, 0, scratch, BLOCK});
      x = scratch;
      x_stride = BLOCK;
    }
    T* target = staged ? scratch : out + at;
    const long stride = staged ? BLOCK : B;
    const T* base = layer.residual ? u + at : nullptr;
    product(w, x, x_stride, n, Value<T, A>{h, base, B, add ? add + at : nullptr, B, target, stride});
    if (staged)
      for (int r = 0; r < w.rows; r++) __builtin_memcpy(out + r * B + at, scratch + r * BLOCK, n * sizeof(T));
  }
}

template <class T, template <class> class A>
void adjoint_as(const Layer& layer, long B, T h, const T* theta, const T* u, const T* v, const T* add, T* out,
                T* gradient, T* scratch) {
  constexpr int L = XBRAID_BYTES / sizeof(T);
  const int O = layer.outputs, I = layer.inputs;
  T* d = scratch;
  T* middle = d + O * BLOCK;
  T* inner = middle + (layer.midpoint ? I * BLOCK : 0);
  T* sums = inner + (layer.midpoint ? I * BLOCK : 0);
  T* weights = sums + long(O) * (I + 1) * L;
  const Packed<T> forward = forward_weights<T, A>(layer, theta, weights);
  const Packed<T> transposed =
      pack<T>(theta, I, O, 1, I, nullptr, 0, T(1), T(0), weights + long(O) * (I + 1));
  if (gradient)
    for (long i = 0; i < long(O) * (I + 1) * L; i++) sums[i] = 0;
  for (long at = 0; at < B; at += BLOCK) {
    const long n = B - at < BLOCK ? B - at : BLOCK;
    const T* back = v + at;
    const T* more = nullptr;
    long back_stride = B;
    if (layer.midpoint) {
      product(forward, u + at, B, n, Value<T, A>{h / 2, u + at, B, nullptr, 0, middle, BLOCK});
      product(forward, middle, BLOCK, n, Slope<T, A>{v + at, B, d, BLOCK});
      if (gradient) add_gradient(layer, d, middle, BLOCK, n, sums);
      product(transposed, d, BLOCK, n, Sum<T>{h, nullptr, 0, nullptr, 0, nullptr, 0, inner, BLOCK});
      back = more = inner;
      back_stride = BLOCK;
    }
    // The states of a deep network come from memory, in runs too short for the processor to foresee the next one. An
    // address behind the last sample is only a hint gone astray.
    // Of the step to the middle it is half of it, so that all of the gradient is a multiple of h.
    if (layer.midpoint)
      product<true>(forward, u + at, B, n, Slope<T, A, true>{back, back_stride, d, BLOCK});
    else
      product<true>(forward, u + at, B, n, Slope<T, A>{back, back_stride, d, BLOCK});
    if (gradient) add_gradient(layer, d, u + at, B, n, sums);
    if (out) {
      const T* base = layer.residual ? v + at : nullptr;
      product(transposed, d, BLOCK, n, Sum<T>{h, base, B, add ? add + at : nullptr, B, more, BLOCK, out + at, B});
    }
  }
  if (gradient) write_gradient(layer, h, sums, gradient);
}

template <class T>
void step(const Layer& layer, long B, T h, const T* theta, const T* u, const T* add, T* out, T* scratch) {
  switch (layer.activation) {
    case xbraid::SMOOTH_RELU: return step_as<T, SmoothRelu>(layer, B, h, theta, u, add, out, scratch);
    case xbraid::RELU: return step_as<T, Relu>(layer, B, h, theta, u, add, out, scratch);
    case xbraid::TANH: return step_as<T, Tanh>(layer, B, h, theta, u, add, out, scratch);
    default: return step_as<T, Identity>(layer, B, h, theta, u, add, out, scratch);
  }
}

template <class T>
void adjoint(const Layer& layer, long B, T h, const T* theta, const T* u, const T* v, const T* add, T* out, T* gradient,
             T* scratch) {
  switch (layer.activation) {
    case xbraid::SMOOTH_RELU: return adjoint_as<T, SmoothRelu>(layer, B, h, theta, u, v, add, out, gradient, scratch);
    case xbraid::RELU: return adjoint_as<T, Relu>(layer, B, h, theta, u, v, add, out, gradient, scratch);
    case xbraid::TANH: return adjoint_as<T, Tanh>(layer, B, h, theta, u, v, add, out, gradient, scratch);
    default: return adjoint_as<T, Identity>(layer, B, h, theta, u, v, add, out, gradient, scratch);
  }
}

template <class T>
long scratch_size(const Layer& layer) {
  const long L = XBRAID_BYTES / sizeof(T), O = layer.outputs, I = layer.inputs;
  return (O + 2 * I) * BLOCK + O * (I + 1) * (L + 1) + I * (O + 1);
}

}  // namespace

namespace xbraid {
const Instructions XBRAID_TABLE = {
    XBRAID_NAME,
    XBRAID_MAX_WIDTH,
    {step<double>, adjoint<double>, scratch_size<double>, distance<double>, cross_entropy<double>, products<double>,
     combine<double>},
    {step<float>, adjoint<float>, scratch_size<float>, distance<float>, cross_entropy<float>, products<float>,
     combine<float>},
};
}
