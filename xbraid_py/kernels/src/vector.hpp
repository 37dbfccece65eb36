// Vectors of numbers, and the activation functions on them. Included once by each instruction set; everything has
// internal linkage, so that code for one processor cannot end up in another's table.

#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Loops over the vectors of a register tile: rolled up, the compiler would keep the tile in memory.
#define XBRAID_UNROLL _Pragma("GCC unroll 8")

namespace {

// L numbers of type T.
template <class T, int L>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * L)));
};

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// The first n numbers of a vector, 0 < n <= L, the others zero; nothing behind them is touched.
template <class V, class T>
inline V load_some(const T* p, long n) {
  constexpr int L = sizeof(V) / sizeof(T);
  T lanes[L];
  for (int l = 0; l < L; l++) lanes[l] = l < n ? p[l] : T(0);
  return load<V>(lanes);
}

template <class T, class V>
inline void store_some(T* p, V v, long n) {
  constexpr int L = sizeof(V) / sizeof(T);
  T lanes[L];
  store(lanes, v);
  for (int l = 0; l < L && l < n; l++) p[l] = lanes[l];
}

// The same with the masks of the processor.
#if defined(__AVX512F__)
#define XBRAID_SOME(T, MASK, LOAD, STORE)                                      \
  template <>                                                                  \
  inline VectorOf<T, 64 / sizeof(T)>::type load_some(const T* p, long n) {     \
    return LOAD(MASK((1u << n) - 1), p);                                       \
  }                                                                            \
  template <>                                                                  \
  inline void store_some(T* p, VectorOf<T, 64 / sizeof(T)>::type v, long n) {  \
    STORE(p, MASK((1u << n) - 1), v);                                          \
  }
XBRAID_SOME(double, __mmask8, _mm512_maskz_loadu_pd, _mm512_mask_storeu_pd)
XBRAID_SOME(float, __mmask16, _mm512_maskz_loadu_ps, _mm512_mask_storeu_ps)
#elif defined(__AVX2__)
inline __m256i mask_of(double, long n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline __m256i mask_of(float, long n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#define XBRAID_SOME(T, LOAD, STORE)                                            \
  template <>                                                                  \
  inline VectorOf<T, 32 / sizeof(T)>::type load_some(const T* p, long n) {     \
    return LOAD(p, mask_of(T(), n));                                           \
  }                                                                            \
  template <>                                                                  \
  inline void store_some(T* p, VectorOf<T, 32 / sizeof(T)>::type v, long n) {  \
    if (n == 32 / sizeof(T)) return store(p, v);                               \
    STORE(p, mask_of(T(), n), v);                                              \
  }
XBRAID_SOME(double, _mm256_maskload_pd, _mm256_maskstore_pd)
XBRAID_SOME(float, _mm256_maskload_ps, _mm256_maskstore_ps)
#endif

// S vectors one after the other in memory: s says which of them.
template <class V, int S>
struct Whole {
  template <class T>
  inline V from(const T* p, int s) const {
    return load<V>(p + s * int(sizeof(V) / sizeof(T)));
  }
  template <class T>
  inline void to(T* p, int s, V v) const {
    store(p + s * int(sizeof(V) / sizeof(T)), v);
  }
};

// The same where the last one has only so many numbers.
template <class V, int S>
struct Ending {
  long last;

  template <class T>
  inline V from(const T* p, int s) const {
    p += s * int(sizeof(V) / sizeof(T));
    return s < S - 1 ? load<V>(p) : load_some<V>(p, last);
  }
  template <class T>
  inline void to(T* p, int s, V v) const {
    p += s * int(sizeof(V) / sizeof(T));
    if (s < S - 1)
      store(p, v);
    else
      store_some(p, v, last);
  }
};

// z += what is in memory, in rows
template <int R, int S, class V, class T, class Place>
inline void add_to(V (&z)[R][S], const T* from, long stride, const Place& place) {
  XBRAID_UNROLL for (int r = 0; r < R; r++)
    XBRAID_UNROLL for (int s = 0; s < S; s++) z[r][s] += place.from(from + r * stride, s);
}

template <int R, int S, class V, class T, class Place>
inline void store_tile(const V (&z)[R][S], T* to, long stride, const Place& place) {
  XBRAID_UNROLL for (int r = 0; r < R; r++)
    XBRAID_UNROLL for (int s = 0; s < S; s++) place.to(to + r * stride, s, z[r][s]);
}

// Subtracting zero keeps every number, minus zero included, and the compiler knows it.
template <class V, class T>
inline V broadcast(T x) {
  return x - V{};
}

// a > b ? a : b and a < b ? a : b, which is b if either is NaN. The compiler does not make one instruction of this for
// vectors, though there is one.
template <class V>
inline V greater(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
// a b + c, rounded once where the processor does so. Written out: whether the compiler finds it depends on what stands
// around it, and a sample must have the same bits wherever it is in its batch.
template <class V>
inline V fused(V a, V b, V c) {
  return a * b + c;
}
#define XBRAID_VECTOR(T, BYTES, MAX, MIN, FMA)                                                      \
  inline VectorOf<T, BYTES / sizeof(T)>::type greater(VectorOf<T, BYTES / sizeof(T)>::type a,      \
                                                      VectorOf<T, BYTES / sizeof(T)>::type b) {    \
    return MAX(a, b);                                                                              \
  }                                                                                                \
  inline VectorOf<T, BYTES / sizeof(T)>::type smaller(VectorOf<T, BYTES / sizeof(T)>::type a,      \
                                                      VectorOf<T, BYTES / sizeof(T)>::type b) {    \
    return MIN(a, b);                                                                              \
  }                                                                                                \
  inline VectorOf<T, BYTES / sizeof(T)>::type fused(VectorOf<T, BYTES / sizeof(T)>::type a,        \
                                                    VectorOf<T, BYTES / sizeof(T)>::type b,        \
                                                    VectorOf<T, BYTES / sizeof(T)>::type c) {      \
    return FMA(a, b, c);                                                                           \
  }
#define XBRAID_NOT_FUSED(a, b, c) ((a) * (b) + (c))
#if defined(__AVX512F__)
XBRAID_VECTOR(double, 64, _mm512_max_pd, _mm512_min_pd, _mm512_fmadd_pd)
XBRAID_VECTOR(float, 64, _mm512_max_ps, _mm512_min_ps, _mm512_fmadd_ps)
#elif defined(__AVX2__)
XBRAID_VECTOR(double, 32, _mm256_max_pd, _mm256_min_pd, _mm256_fmadd_pd)
XBRAID_VECTOR(float, 32, _mm256_max_ps, _mm256_min_ps, _mm256_fmadd_ps)
#elif defined(__SSE2__)
XBRAID_VECTOR(double, 16, _mm_max_pd, _mm_min_pd, XBRAID_NOT_FUSED)
XBRAID_VECTOR(float, 16, _mm_max_ps, _mm_min_ps, XBRAID_NOT_FUSED)
#elif defined(__aarch64__)
// Of NEON only the fused product: vmaxq and vminq are NaN where either number is, and the compiler has fcmgt and bsl.
inline VectorOf<double, 2>::type fused(VectorOf<double, 2>::type a, VectorOf<double, 2>::type b,
                                       VectorOf<double, 2>::type c) {
  return vfmaq_f64(c, a, b);
}
inline VectorOf<float, 4>::type fused(VectorOf<float, 4>::type a, VectorOf<float, 4>::type b,
                                      VectorOf<float, 4>::type c) {
  return vfmaq_f32(c, a, b);
}
#endif

// A number of rows, as a type.
template <int COUNT>
struct Rows {
  static constexpr int count = COUNT;
};

// NaN stays NaN.
template <class V>
inline V at_least_zero(V x) {
  return greater(V{}, x);
}

// An activation is FACTOR value(SCALE z + SHIFT), and its slope slope(SCALE z + SHIFT).
template <class T>
struct Plain {
  static constexpr T SCALE = 1, SHIFT = 0, FACTOR = 1;
  static constexpr bool LINEAR = false;
};

// With q = max(z / (2 eta) + 1/2, 0) and p = min(q, 1), the slope, it is eta (p^2 + 2 (q - p)) on all of its three
// pieces. Where p is not q it is 1: p^2 + 2 (q - p) = p (2 q - p).
template <class T>
struct SmoothRelu {
  static constexpr bool LINEAR = false;
  static constexpr T FACTOR = T(0.1), SCALE = T(0.5) / FACTOR, SHIFT = T(0.5);

  template <class V>
  static inline V value(V z) {
    const V q = at_least_zero(z), p = smaller(broadcast<V>(T(1)), q);
    return p * (q + (q - p));
  }
  template <class V>
  static inline V slope(V z) {
    return smaller(broadcast<V>(T(1)), at_least_zero(z));
  }
};

template <class T>
struct Relu : Plain<T> {
  template <class V>
  static inline V value(V z) {
    return at_least_zero(z);
  }
  template <class V>
  static inline V slope(V z) {
    V step = z > 0 ? broadcast<V>(T(1)) : V{};
    return z != z ? z : step;
  }
};

template <class T>
struct Identity : Plain<T> {
  static constexpr bool LINEAR = true;

  template <class V>
  static inline V value(V z) {
    return z;
  }
  template <class V>
  static inline V slope(V z) {
    return broadcast<V>(T(1));
  }
};

// What exp(y) needs: y = k ln 2 + r with |r| <= ln 2 / 2, a Taylor polynomial in r, and 2^k.
template <class T>
struct Exponential;

template <>
struct Exponential<double> {
  static constexpr double ROUND = 0x1.8p52, LOG2E = 0x1.71547652b82fep+0;
  static constexpr double LN2_HIGH = 0x1.62e42fee00000p-1, LN2_LOW = 0x1.a39ef35793c76p-33;
  static constexpr double SATURATED = 44.0;  // 2 |x| from which on tanh(x) is 1
  static constexpr double SMALLEST = -708.0;  // below it exp is taken for 0
  static constexpr int DEGREE = 13, MANTISSA = 52;
  static constexpr unsigned long long ONE = 0x3ff0000000000000;
  typedef unsigned long long Integer;
};

template <>
struct Exponential<float> {
  static constexpr float ROUND = 0x1.8p23f, LOG2E = 0x1.715476p+0f;
  static constexpr float LN2_HIGH = 0x1.62e400p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
  static constexpr float SATURATED = 20.0f;
  static constexpr float SMALLEST = -87.0f;
  static constexpr int DEGREE = 7, MANTISSA = 23;
  static constexpr unsigned ONE = 0x3f800000;
  typedef unsigned Integer;
};

// exp(y) = power (1 + p)
template <class T, class V>
inline void split_exponential(V y, V& power, V& p) {
  typedef Exponential<T> E;
  constexpr int L = sizeof(V) / sizeof(T);
  typedef typename VectorOf<typename E::Integer, L>::type I;
  const V one = broadcast<V>(T(1)), rounded = fused(y, broadcast<V>(E::LOG2E), broadcast<V>(E::ROUND));
  const V k = rounded - E::ROUND;
  V r = fused(k, broadcast<V>(-E::LN2_HIGH), y);
  r = fused(k, broadcast<V>(-E::LN2_LOW), r);
  p = one;
  for (int n = E::DEGREE; n > 1; n--) p = fused(V(p * r), broadcast<V>(T(1) / n), one);
  p = p * r;
  // The last bits of `rounded` are k.
  I bits;
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  bits = (bits << E::MANTISSA) + E::ONE;
  __builtin_memcpy(&power, &bits, sizeof power);
}

template <class T>
struct Tanh : Plain<T> {
  // (e^y - 1) / (e^y + 1) with y = 2 |x|, through e^y - 1, which keeps small arguments exact.
  template <class V>
  static inline V value(V x) {
    V y = 2 * (x < 0 ? -x : x), power, p;
    y = y > Exponential<T>::SATURATED ? broadcast<V>(Exponential<T>::SATURATED) : y;
    split_exponential<T>(y, power, p);
    V e = fused(power, p, V(power - 1));
    V t = e / (e + 2);
    return x < 0 ? -t : t;
  }
  template <class V>
  static inline V slope(V z) {
    V t = value(z);
    return fused(t, V(-t), broadcast<V>(T(1)));
  }
};

}  // namespace
