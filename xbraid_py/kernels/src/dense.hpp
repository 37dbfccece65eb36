// What the kernels of all instruction sets share: plain data and a table of functions.
//
// Layers are sigma(W u + b) for all samples of a batch, features outermost: a state is an array (C, B). Nothing here
// may be an inline function or a template with code in it: the linker would be free to keep the copy that was
// compiled for a newer processor than the one it runs on.

#pragma once

namespace xbraid {

enum Activation { SMOOTH_RELU = 0, RELU = 1, TANH = 2, IDENTITY = 3 };

// One layer, or one step of a residual network: u + h F(u), or with `midpoint` u + h F(u + h/2 F(u)).
struct Layer {
  int inputs;
  int outputs;
  int activation;
  int scalar_bias;  // one bias for all outputs
  int residual;     // whether u is added
  int midpoint;
};

// Samples that go through a step together: their rows stay in the first cache.
constexpr long BLOCK = 256;

// One of several adjoints in a row, at the state u. `out` may be null: the result only goes on to the next one, and of
// the last is not asked for.
template <class T>
struct Adjoint {
  T h;
  const T* theta;
  const T* u;
  const T* add;
  T* out;
  T* gradient;
};

// The functions for one type of numbers. `theta` holds W (outputs x inputs) and then b. `add` may be null; `out` may be
// any of `u`, `v` and `add`, but must not overlap them in another way. `scratch` has `scratch_size` numbers.
template <class T>
struct Functions {
  // out = [u +] h sigma(W u + b) [+ add], or one midpoint step.
  void (*step)(const Layer& layer, long batch, T h, const T* theta, const T* u, const T* add, T* out, T* scratch);
  // The transposed Jacobians of `count` steps, out = [v +] h W^T (sigma'(W u + b) v) [+ add]: a block of samples goes
  // through all of them while it is in the first cache. `gradient`, laid out as theta, gets the derivative with respect
  // to W and b, if it is not null. `after` is the state that is asked for next, or null.
  void (*adjoints)(const Layer& layer, long batch, long count, const Adjoint<T>* steps, const T* v, const T* after,
                   T* scratch);
  // For so many adjoints in a row, or a step.
  long (*scratch_size)(const Layer& layer, long count);
  // sums[0] = |a - b|^2, sums[1] = |a|^2 for n numbers each.
  void (*distance)(long n, const T* a, const T* b, T* sums);
  // d = b, or b - c if c is not null; a += d, and `difference`, if it is not null, gets d. sums[0] = |d|^2, sums[1] =
  // |a|^2 of what a has become.
  void (*move)(long n, T* a, const T* b, const T* c, T* difference, T* sums);
  // found[0] = the cross entropy of softmax(W u + b), summed over the samples, found[1] = how many of them have the label
  // as the first of their largest outputs; `slope`, if it is not null, gets softmax less one-hot.
  void (*cross_entropy)(const Layer& layer, long batch, const T* theta, const T* u, const long long* labels, T* slope,
                        long slope_stride, double* found, T* scratch);
  // found[i][j][part] = the product of a[i] and b[j] from bounds[part] to bounds[part + 1]; `sums` has room for
  // na * nb vectors.
  void (*products)(long na, const T* const* a, long nb, const T* const* b, long parts, const long* bounds, T* found,
                   T* sums);
  // out = the sum of coefficients[k] vectors[k] for k = 0, 1, ..., n numbers each; out may be one of them.
  void (*combine)(long n, long count, const double* coefficients, const T* const* vectors, T* out);
};

struct Instructions {
  const char* name;
  int max_width;  // wider layers are better left to BLAS
  Functions<double> f64;
  Functions<float> f32;
};

extern const Instructions baseline;
extern const Instructions avx2;
extern const Instructions avx512;

}  // namespace xbraid
