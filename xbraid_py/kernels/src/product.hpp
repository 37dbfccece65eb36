// Products z = W x + b for all samples of a block, and what becomes of them. Included once by each instruction set, with
// vectors of `XBRAID_BYTES` bytes and register tiles of `XBRAID_ROWS` rows by 2.
//
// Shape letters: B samples of the batch, n of them in a block. A row is one feature of all samples.

#pragma once

#include "dense.hpp"
#include "vector.hpp"

namespace {

using xbraid::BLOCK;
using xbraid::Layer;

// ---- What becomes of a tile of R rows by S vectors of products z = W x + b. `row` is its first row, `at` the place of
// its first sample in a row, `place` whether its last vector is a whole one.

// out = base + add + h sigma(z), for z times the scale of the activation and moved by its shift
template <class T, template <class> class A>
struct Value {
  T h;
  const T* base;
  long base_stride;
  const T* add;
  long add_stride;
  T* out;
  long out_stride;

  template <int R, int S, class V, class Place>
  inline void operator()(int row, long at, V (&z)[R][S], const Place& place) const {
    const V factor = broadcast<V>(T(h * A<T>::FACTOR));
    if (base) {
      const T* from = base + row * base_stride + at;
      XBRAID_UNROLL for (int r = 0; r < R; r++)
        XBRAID_UNROLL for (int s = 0; s < S; s++)
          z[r][s] = fused(factor, A<T>::value(z[r][s]), place.from(from + r * base_stride, s));
    } else {
      XBRAID_UNROLL for (int r = 0; r < R; r++)
        XBRAID_UNROLL for (int s = 0; s < S; s++) z[r][s] = factor * A<T>::value(z[r][s]);
    }
    if (add) add_to(z, add + row * add_stride + at, add_stride, place);
    store_tile(z, out + row * out_stride + at, out_stride, place);
  }
};

// out = sigma'(z) v, or half of it
template <class T, template <class> class A, bool HALF = false>
struct Slope {
  const T* v;
  long v_stride;
  T* out;
  long out_stride;

  template <int R, int S, class V, class Place>
  inline void operator()(int row, long at, V (&z)[R][S], const Place& place) const {
    const T* from = v + row * v_stride + at;
    XBRAID_UNROLL for (int r = 0; r < R; r++)
      XBRAID_UNROLL for (int s = 0; s < S; s++) {
        const V d = A<T>::slope(z[r][s]) * place.from(from + r * v_stride, s);
        z[r][s] = HALF ? V(d * T(0.5)) : d;
      }
    store_tile(z, out + row * out_stride + at, out_stride, place);
  }
};

// out = base + add + more + h z
template <class T>
struct Sum {
  T h;
  const T* base;
  long base_stride;
  const T* add;
  long add_stride;
  const T* more;
  long more_stride;
  T* out;
  long out_stride;

  template <int R, int S, class V, class Place>
  inline void operator()(int row, long at, V (&z)[R][S], const Place& place) const {
    V sum[R][S] = {};
    if (more) add_to(sum, more + row * more_stride + at, more_stride, place);
    if (base) add_to(sum, base + row * base_stride + at, base_stride, place);
    if (add) add_to(sum, add + row * add_stride + at, add_stride, place);
    XBRAID_UNROLL for (int r = 0; r < R; r++)
      XBRAID_UNROLL for (int s = 0; s < S; s++) z[r][s] = fused(z[r][s], broadcast<V>(h), sum[r][s]);
    store_tile(z, out + row * out_stride + at, out_stride, place);
  }
};

// ---- z = W x + b for all samples of a block, tile by tile of rows.

// Calls f with the number of rows of each tile, as a type, and its first row.
template <class F>
inline void for_tiles(int rows, const F& f) {
  int row = 0;
#if XBRAID_ROWS >= 8
  for (; row + 8 <= rows; row += 8) f(Rows<8>(), row);
#endif
  for (; row + 4 <= rows; row += 4) f(Rows<4>(), row);
  for (; row + 2 <= rows; row += 2) f(Rows<2>(), row);
  for (; row < rows; row++) f(Rows<1>(), row);
}

// Weights in the order in which the tiles read them: for each tile its biases, then the entries of one column after the
// other. `data` has rows x (columns + 1) numbers.
template <class T>
struct Packed {
  const T* data;
  int rows;
  int columns;
};

// scale W and scale b + shift; the bias is 0 where b is null.
template <class T>
Packed<T> pack(const T* w, int rows, int columns, long row_stride, long column_stride, const T* b, int b_stride,
               T scale, T shift, T* data) {
  T* to = data;
  for_tiles(rows, [&](auto tile, int row) {
    for (int r = row; r < row + tile.count; r++) *to++ = b ? T(scale * b[r * b_stride] + shift) : T(0);
    for (int i = 0; i < columns; i++)
      for (int r = row; r < row + tile.count; r++) *to++ = scale * w[r * row_stride + i * column_stride];
  });
  return {data, rows, columns};
}

// With FAR, what lies `far` numbers from x is also asked for from memory.
template <bool FAR, int R, int S, class V, class T, class Place, class End>
inline void tile(const T* weights, int columns, int row, const T* x, long stride, long at, const Place& place,
                 const End& end, long far) {
  constexpr int L = sizeof(V) / sizeof(T);
  V z[R][S];
  XBRAID_UNROLL for (int r = 0; r < R; r++)
    XBRAID_UNROLL for (int s = 0; s < S; s++) z[r][s] = broadcast<V>(weights[r]);
  x += at;
  for (int i = 0; i < columns; i++) {
    V xs[S];
    XBRAID_UNROLL for (int s = 0; s < S; s++) {
      xs[s] = place.from(x, s);
      if (FAR) __builtin_prefetch(x + s * L + far);
    }
    x += stride;
    weights += R;
    XBRAID_UNROLL for (int r = 0; r < R; r++) {
      const V weight = broadcast<V>(weights[r]);
      XBRAID_UNROLL for (int s = 0; s < S; s++) z[r][s] = fused(weight, xs[s], z[r][s]);
    }
  }
  end(row, at, z, place);
}

template <bool FAR = false, class T, class End>
void product(const Packed<T>& w, const T* x, long stride, long n, const End& end, long far = 0) {
  constexpr int L = XBRAID_BYTES / sizeof(T);
  typedef typename VectorOf<T, L>::type V;
  for_tiles(w.rows, [&](auto rows, int row) {
    constexpr int R = decltype(rows)::count;
    const T* weights = w.data + long(row) * (w.columns + 1);
    long at = 0;
    for (; at + 2 * L <= n; at += 2 * L)
      tile<FAR, R, 2, V>(weights, w.columns, row, x, stride, at, Whole<V, 2>(), end, far);
    const long rest = n - at;
    if (rest > L)
      tile<FAR, R, 2, V>(weights, w.columns, row, x, stride, at, Ending<V, 2>{rest - L}, end, far);
    else if (rest > 0)
      tile<FAR, R, 1, V>(weights, w.columns, row, x, stride, at, Ending<V, 1>{rest}, end, far);
  });
}

// W and b as the products of a step need them; the activation's scale and shift are in them.
template <class T, template <class> class A>
Packed<T> forward_weights(const Layer& l, const T* theta, T* data) {
  const T* b = theta + long(l.outputs) * l.inputs;
  return pack(theta, l.outputs, l.inputs, l.inputs, 1, b, l.scalar_bias ? 0 : 1, A<T>::SCALE, A<T>::SHIFT, data);
}

}  // namespace
