// Flat vectors of numbers: distances, changes, products in parts, sums. Included once by each instruction set.
//
// Everything is summed in an order that depends on the length alone: not on where a vector begins, nor on how many
// there are.

#include "vector.hpp"

namespace {

template <class T>
struct Flat {
  static constexpr int L = XBRAID_BYTES / sizeof(T);
  static constexpr long PAGE = 4096 / sizeof(T);  // numbers of a vector that are read before those of the next one
  typedef typename VectorOf<T, L>::type V;
};

template <class T>
T reduced(const T* vector) {
  T sum = 0;
  for (int l = 0; l < Flat<T>::L; l++) sum += vector[l];
  return sum;
}

// sums[0] = |a - b|^2, sums[1] = |a|^2 for n numbers each.
template <class T>
void distance(long n, const T* a, const T* b, T* sums) {
  constexpr int L = Flat<T>::L, CHAINS = 4;
  typedef typename Flat<T>::V V;
  V difference[CHAINS] = {}, size[CHAINS] = {};
  long at = 0;
  const auto add = [&](int c, V x, V y) {
    const V d = x - y;
    difference[c] = fused(d, d, difference[c]);
    size[c] = fused(x, x, size[c]);
  };
  for (; at + CHAINS * L <= n; at += CHAINS * L)
    for (int c = 0; c < CHAINS; c++) add(c, load<V>(a + at + c * L), load<V>(b + at + c * L));
  for (; at + L <= n; at += L) add(0, load<V>(a + at), load<V>(b + at));
  if (at < n) add(0, load_some<V>(a + at, n - at), load_some<V>(b + at, n - at));
  T lanes[L];
  store(lanes, V((difference[0] + difference[1]) + (difference[2] + difference[3])));
  sums[0] = reduced(lanes);
  store(lanes, V((size[0] + size[1]) + (size[2] + size[3])));
  sums[1] = reduced(lanes);
}

// d = b, or b - c where c is not null; a += d; `difference`, if it is not null, gets d, and may be b or c.
// sums[0] = |d|^2, sums[1] = |a|^2 of what a has become, for n numbers each.
template <class T>
void move(long n, T* a, const T* b, const T* c, T* difference, T* sums) {
  constexpr int L = Flat<T>::L, CHAINS = 4;
  typedef typename Flat<T>::V V;
  V changes[CHAINS] = {}, sizes[CHAINS] = {};
  long at = 0;
  const auto add = [&](int k, long from, const auto& taken, const auto& put) {
    V d = taken(b + from);
    if (c) d = d - taken(c + from);
    const V x = taken(a + from) + d;
    put(a + from, x);
    if (difference) put(difference + from, d);
    changes[k] = fused(d, d, changes[k]);
    sizes[k] = fused(x, x, sizes[k]);
  };
  const auto whole = [](const T* place) { return load<V>(place); };
  const auto put_whole = [](T* place, V x) { store(place, x); };
  for (; at + CHAINS * L <= n; at += CHAINS * L)
    for (int k = 0; k < CHAINS; k++) add(k, at + k * L, whole, put_whole);
  for (; at + L <= n; at += L) add(0, at, whole, put_whole);
  if (at < n)
    add(0, at, [&](const T* place) { return load_some<V>(place, n - at); },
        [&](T* place, V x) { store_some(place, x, n - at); });
  T lanes[L];
  store(lanes, V((changes[0] + changes[1]) + (changes[2] + changes[3])));
  sums[0] = reduced(lanes);
  store(lanes, V((sizes[0] + sizes[1]) + (sizes[2] + sizes[3])));
  sums[1] = reduced(lanes);
}

// Adds the products of R vectors with S others, n numbers of each, to vectors of partial sums.
template <int R, int S, class T>
inline void product_tile(const T* const* a, const T* const* b, long from, long n, T* sums, long stride) {
  constexpr int L = Flat<T>::L;
  typedef typename Flat<T>::V V;
  V sum[R][S] = {};
  const T *as[R], *bs[S];
  XBRAID_UNROLL for (int r = 0; r < R; r++) as[r] = a[r] + from;
  XBRAID_UNROLL for (int s = 0; s < S; s++) bs[s] = b[s] + from;
  const auto add = [&](const auto& taken) {
    V x[R];
    XBRAID_UNROLL for (int r = 0; r < R; r++) x[r] = taken(as[r]);
    XBRAID_UNROLL for (int s = 0; s < S; s++) {
      const V y = taken(bs[s]);
      XBRAID_UNROLL for (int r = 0; r < R; r++) sum[r][s] = fused(x[r], y, sum[r][s]);
    }
  };
  long at = 0;
  for (; at + L <= n; at += L) add([&](const T* p) { return load<V>(p + at); });
  if (at < n) add([&](const T* p) { return load_some<V>(p + at, n - at); });
  XBRAID_UNROLL for (int r = 0; r < R; r++)
    XBRAID_UNROLL for (int s = 0; s < S; s++) {
      T* place = sums + r * stride + s * L;
      store(place, V(load<V>(place) + sum[r][s]));
    }
}

template <int R, class T>
inline void product_rows(const T* const* a, long nb, const T* const* b, long from, long n, T* sums) {
  constexpr int L = Flat<T>::L;
  long j = 0;
  for (; j + 4 <= nb; j += 4) product_tile<R, 4>(a, b + j, from, n, sums + j * L, nb * L);
  for (; j < nb; j++) product_tile<R, 1>(a, b + j, from, n, sums + j * L, nb * L);
}

// found[i][j][part] = <a[i], b[j]> from bounds[part] to bounds[part + 1]. Page by page of all vectors, so that each is
// read from memory once; `sums` has a vector of numbers for each product.
template <class T>
void products(long na, const T* const* a, long nb, const T* const* b, long parts, const long* bounds, T* found,
              T* sums) {
  constexpr int L = Flat<T>::L;
  constexpr long PAGE = Flat<T>::PAGE;
  for (long part = 0; part < parts; part++) {
    for (long i = 0; i < na * nb * L; i++) sums[i] = 0;
    for (long from = bounds[part]; from < bounds[part + 1]; from += PAGE) {
      const long left = bounds[part + 1] - from, n = left < PAGE ? left : PAGE;
      long i = 0;
      for (; i + 2 <= na; i += 2) product_rows<2>(a + i, nb, b, from, n, sums + i * nb * L);
      for (; i < na; i++) product_rows<1>(a + i, nb, b, from, n, sums + i * nb * L);
    }
    for (long i = 0; i < na * nb; i++) found[i * parts + part] = reduced(sums + i * L);
  }
}

// S vectors of numbers of the sum, from the number `at` on; the last of them may be a part of one.
template <int S, class T, class Load, class Store>
inline void combine_tile(long count, const double* coefficients, const T* const* vectors, const Load& taken,
                         const Store& put) {
  typedef typename Flat<T>::V V;
  V sum[S];
  XBRAID_UNROLL for (int s = 0; s < S; s++) sum[s] = T(coefficients[0]) * taken(vectors[0], s);
  for (long k = 1; k < count; k++) {
    const V factor = broadcast<V>(T(coefficients[k]));
    XBRAID_UNROLL for (int s = 0; s < S; s++) sum[s] = fused(factor, taken(vectors[k], s), sum[s]);
  }
  XBRAID_UNROLL for (int s = 0; s < S; s++) put(sum[s], s);
}

// out = sum of coefficients[k] vectors[k], in this order; out may be one of the vectors.
template <class T>
void combine(long n, long count, const double* coefficients, const T* const* vectors, T* out) {
  constexpr int L = Flat<T>::L, AT_ONCE = 4;
  typedef typename Flat<T>::V V;
  long at = 0;
  const auto whole = [&](const T* p, int s) { return load<V>(p + at + s * L); };
  const auto put = [&](V sum, int s) { store(out + at + s * L, sum); };
  for (; at + AT_ONCE * L <= n; at += AT_ONCE * L) combine_tile<AT_ONCE>(count, coefficients, vectors, whole, put);
  for (; at + L <= n; at += L) combine_tile<1>(count, coefficients, vectors, whole, put);
  if (at < n)
    combine_tile<1>(count, coefficients, vectors, [&](const T* p, int) { return load_some<V>(p + at, n - at); },
                    [&](V sum, int) { store_some(out + at, sum, n - at); });
}

}  // namespace
