// Softmax and cross entropy of a linear layer. Included once by each instruction set.

#include "product.hpp"

namespace {

// exp(y) for y <= 0; NaN stays NaN.
template <class T, class V>
inline V exponential(V y) {
  V power, p;
  split_exponential<T>(y, power, p);
  return y < Exponential<T>::SMALLEST ? V{} : fused(power, p, power);
}

// found[0] = the sum over samples of log(sum_k exp(z_k)) - z_label with z = W u + b, found[1] = how many of them have
// the label as the first of their largest z; slope = exp(z) / sum(exp(z)) - [k = label], where it is not null.
template <class T>
void cross_entropy(const Layer& layer, long B, const T* theta, const T* u, const long long* labels, T* slope,
                   long slope_stride, double* found, T* scratch) {
  constexpr int L = XBRAID_BYTES / sizeof(T);
  // One logarithm for so many samples: of the product of their sums, each of them between 1 and K <= 64.
  constexpr long TOGETHER = 64;
  static_assert(XBRAID_MAX_WIDTH <= 64 && BLOCK % TOGETHER == 0 && TOGETHER / L <= (sizeof(T) == 4 ? 16 : 32), "");
  typedef typename VectorOf<T, L>::type V;
  typedef typename Exponential<T>::Integer Integer;
  typedef typename VectorOf<Integer, L>::type I;
  const int K = layer.outputs;
  const Packed<T> w = forward_weights<T, Identity>(layer, theta, scratch + K * BLOCK);
  T* const z = scratch;
  Integer own[BLOCK];
  I places;
  for (int l = 0; l < L; l++) places[l] = l;
  double loss = 0;
  long right = 0;
  for (long at = 0; at < B; at += BLOCK) {
    const long n = B - at < BLOCK ? B - at : BLOCK;
    product(w, u + at, B, n, Value<T, Identity>{T(1), nullptr, 0, nullptr, 0, z, BLOCK});
    for (long s = 0; s < n; s++) own[s] = Integer(labels[at + s]);
    for (long first = 0; first < n; first += TOGETHER) {
      V sums = broadcast<V>(T(1)), margins = {};
      I hits = {};
      for (long s = first; s < n && s < first + TOGETHER; s += L) {
        const I label = load<I>(own + s), inside = I(places < Integer(n - s < L ? n - s : L));
        V top = load<V>(z + s), chosen = top;
        I best = {};
        for (int k = 1; k < K; k++) {
          const V x = load<V>(z + k * BLOCK + s);
          const I number = Integer(k) + I{};
          // The first of the largest; NaN is larger than all.
          const auto larger = !(x <= top) & (top == top);
          top = larger ? x : top;
          best = larger ? number : best;
          chosen = label == number ? x : chosen;
        }
        V sum = {};
        for (int k = 0; k < K; k++) {
          const V e = exponential<T>(V(load<V>(z + k * BLOCK + s) - top));
          sum += e;
          if (slope) store(z + k * BLOCK + s, e);
        }
        if (slope) {
          const V part = T(1) / sum;
          for (int k = 0; k < K; k++) {
            const V share = load<V>(z + k * BLOCK + s) * part;
            const V d = label == Integer(k) + I{} ? V(share - T(1)) : share;
            Ending<V, 1>{n - s < L ? n - s : L}.to(slope + k * slope_stride + at + s, 0, d);
          }
        }
        sums = inside != I{} ? V(sums * sum) : sums;
        margins = inside != I{} ? V(margins + (top - chosen)) : margins;
        hits += I(best == label) & inside & 1;
      }
      double all = 1;
      for (int l = 0; l < L; l++) {
        all *= double(sums[l]);
        loss += double(margins[l]);
        right += long(hits[l]);
      }
      loss += __builtin_log(all);
    }
  }
  found[0] = loss;
  found[1] = double(right);
}

}  // namespace
