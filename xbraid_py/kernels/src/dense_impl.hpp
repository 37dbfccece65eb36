// The dense step and its adjoint, for whatever instruction set this is compiled. Defines `XBRAID_TABLE`, with vectors of
// `XBRAID_BYTES` bytes and register tiles of 4 rows by `XBRAID_COLUMNS` for the gradients; see product.hpp for the rest.
//
// Shape letters: B samples of the batch, n of them in a block, I inputs, O outputs. A row is one feature of all samples.

#include "flat.hpp"
#include "loss.hpp"
#include "product.hpp"

namespace {

using xbraid::Adjoint;

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
void adjoints_as(const Layer& layer, long B, long count, const Adjoint<T>* steps, const T* v, const T* after,
                 T* scratch) {
  constexpr int L = XBRAID_BYTES / sizeof(T);
  const int O = layer.outputs, I = layer.inputs;
  const long size = long(O) * (I + 1), packed = size + long(I) * (O + 1);
  T* const d = scratch;
  T* const middle = d + O * BLOCK;
  T* const inner = middle + I * BLOCK;
  T* const way = inner + I * BLOCK;
  T* const sums = way + I * BLOCK;
  T* const weights = sums + count * size * L;
  for (long i = 0; i < count; i++) {
    T* const own = weights + i * packed;
    forward_weights<T, A>(layer, steps[i].theta, own);
    pack<T>(steps[i].theta, I, O, 1, I, nullptr, 0, T(1), T(0), own + size);
    if (steps[i].gradient)
      for (long k = i * size * L; k < (i + 1) * size * L; k++) sums[k] = 0;
  }
  for (long at = 0; at < B; at += BLOCK) {
    const long n = B - at < BLOCK ? B - at : BLOCK;
    const T* from = v + at;
    long from_stride = B;
    for (long i = 0; i < count; i++) {
      const Adjoint<T>& step = steps[i];
      const Packed<T> forward = {weights + i * packed, O, I}, transposed = {forward.data + size, I, O};
      const T* const u = step.u + at;
      T* const own = sums + i * size * L;
      // The states of a deep network come from memory, in runs too short for the processor to foresee the next one. An
      // address behind the last sample is only a hint gone astray.
      const T* const next = i + 1 < count ? steps[i + 1].u + at : at + n < B ? steps[0].u + at + n : after ? after : u;
      const long far = (reinterpret_cast<long long>(next) - reinterpret_cast<long long>(u)) / long(sizeof(T));
      const T* back = from;
      const T* more = nullptr;
      long back_stride = from_stride;
      if (layer.midpoint) {
        product(forward, u, B, n, Value<T, A>{step.h / 2, u, B, nullptr, 0, middle, BLOCK});
        product(forward, middle, BLOCK, n, Slope<T, A>{from, from_stride, d, BLOCK});
        if (step.gradient) add_gradient(layer, d, middle, BLOCK, n, own);
        product(transposed, d, BLOCK, n, Sum<T>{step.h, nullptr, 0, nullptr, 0, nullptr, 0, inner, BLOCK});
        back = more = inner;
        back_stride = BLOCK;
        // Of the step to the middle it is half of it, so that all of the gradient is a multiple of h.
        product<true>(forward, u, B, n, Slope<T, A, true>{back, back_stride, d, BLOCK}, far);
      } else if (A<T>::LINEAR) {
        for (int r = 0; r < O; r++) __builtin_memcpy(d + r * BLOCK, from + r * from_stride, n * sizeof(T));
      } else {
        product<true>(forward, u, B, n, Slope<T, A>{back, back_stride, d, BLOCK}, far);
      }
      if (step.gradient) add_gradient(layer, d, u, B, n, own);
      T* const out = step.out ? step.out + at : way;
      const long out_stride = step.out ? B : BLOCK;
      if (step.out || i + 1 < count)
        product(transposed, d, BLOCK, n,
                Sum<T>{step.h, layer.residual ? from : nullptr, from_stride, step.add ? step.add + at : nullptr, B,
                       more, BLOCK, out, out_stride});
      from = out;
      from_stride = out_stride;
    }
  }
  for (long i = 0; i < count; i++)
    if (steps[i].gradient) write_gradient(layer, steps[i].h, sums + i * size * L, steps[i].gradient);
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
void adjoints(const Layer& layer, long B, long count, const Adjoint<T>* each, const T* v, const T* after, T* scratch) {
  switch (layer.activation) {
    case xbraid::SMOOTH_RELU: return adjoints_as<T, SmoothRelu>(layer, B, count, each, v, after, scratch);
    case xbraid::RELU: return adjoints_as<T, Relu>(layer, B, count, each, v, after, scratch);
    case xbraid::TANH: return adjoints_as<T, Tanh>(layer, B, count, each, v, after, scratch);
    default: return adjoints_as<T, Identity>(layer, B, count, each, v, after, scratch);
  }
}

template <class T>
long scratch_size(const Layer& layer, long count) {
  const long L = XBRAID_BYTES / sizeof(T), O = layer.outputs, I = layer.inputs;
  return (O + 3 * I) * BLOCK + count * (O * (I + 1) * (L + 1) + I * (O + 1));
}

}  // namespace

namespace xbraid {
const Instructions XBRAID_TABLE = {
    XBRAID_NAME,
    XBRAID_MAX_WIDTH,
    {step<double>, adjoints<double>, scratch_size<double>, distance<double>, move<double>,
     cross_entropy<double>, products<double>, combine<double>},
    {step<float>, adjoints<float>, scratch_size<float>, distance<float>, move<float>,
     cross_entropy<float>, products<float>, combine<float>},
};
}
