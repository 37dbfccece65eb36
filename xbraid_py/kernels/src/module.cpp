// The Python module: chooses the instruction set at import, and steps through whole intervals without the interpreter.
//
// Arrays are handed over as addresses and strides: the Python side has checked them. Shape letters: m intervals, c steps
// of each, B samples. Strides count numbers, not bytes.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "dense.hpp"

namespace nb = nanobind;
using xbraid::Adjoint;
using xbraid::Functions;
using xbraid::Instructions;
using xbraid::Layer;

namespace {

bool runs_here(const Instructions* set) {
#if defined(XBRAID_HAVE_AVX2) || defined(XBRAID_HAVE_AVX512)
  __builtin_cpu_init();
#endif
#ifdef XBRAID_HAVE_AVX512
  if (set == &xbraid::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef XBRAID_HAVE_AVX2
  if (set == &xbraid::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return set == &xbraid::baseline;
}

// The fastest first.
std::vector<const Instructions*> usable() {
  std::vector<const Instructions*> found;
  for (const Instructions* set : {
#ifdef XBRAID_HAVE_AVX512
           &xbraid::avx512,
#endif
#ifdef XBRAID_HAVE_AVX2
           &xbraid::avx2,
#endif
           &xbraid::baseline})
    if (runs_here(set)) found.push_back(set);
  return found;
}

// Calls do not hold the interpreter's lock: each of them reads this once.
std::atomic<const Instructions*> active{usable().front()};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Instructions* set : usable()) names.push_back(set->name);
  return names;
}

bool use(const std::string& name) {
  for (const Instructions* set : usable())
    if (name == set->name) {
      active = set;
      return true;
    }
  return false;
}

template <class T>
const Functions<T>& functions();
template <>
const Functions<double>& functions<double>() {
  return active.load()->f64;
}
template <>
const Functions<float>& functions<float>() {
  return active.load()->f32;
}

// Room for a call, kept from one call to the next: it only ever grows.
template <class T>
T* room(std::size_t numbers) {
  thread_local std::vector<T> kept;
  const std::size_t size = numbers + 64 / sizeof(T);
  if (kept.size() < size) kept.resize(size);
  const auto address = reinterpret_cast<std::uintptr_t>(kept.data());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Through how many adjoints a block of samples goes at once: what is kept for them has to stay in the second cache.
constexpr long KEPT_BYTES = 128 * 1024;

template <class T>
long at_once(const Functions<T>& table, const Layer& layer, long layers) {
  const long each = (table.scratch_size(layer, 2) - table.scratch_size(layer, 1)) * sizeof(T);
  return std::max(1L, std::min(layers, KEPT_BYTES / each));
}

// Step sizes of the layers: a number for each row, or where there is no address the same for all of them.
template <class T>
struct StepSizes {
  StepSizes(double h, std::uintptr_t hs, long hs_stride) : same(T(h)), each(at<T>(hs)), stride(hs_stride) {}
  T operator[](long row) const { return each ? each[row * stride] : same; }

  const T same;
  const T* const each;
  const long stride;
};

template <class T>
void step(Layer layer, long m, long B, double h, std::uintptr_t hs, long hs_stride, std::uintptr_t theta,
          long theta_stride, std::uintptr_t u, long u_stride, std::uintptr_t add, long add_stride, std::uintptr_t out,
          long out_stride) {
  const StepSizes<T> sizes(h, hs, hs_stride);
  const Functions<T>& table = functions<T>();
  T* scratch = room<T>(table.scratch_size(layer, 1));
  for (long k = 0; k < m; k++)
    table.step(layer, B, sizes[k], at<T>(theta) + k * theta_stride, at<T>(u) + k * u_stride,
               add ? at<T>(add) + k * add_stride : nullptr, at<T>(out) + k * out_stride, scratch);
}

template <class T>
void adjoint(Layer layer, long m, long B, double h, std::uintptr_t hs, long hs_stride, std::uintptr_t theta,
             long theta_stride, std::uintptr_t gradient, long gradient_stride, std::uintptr_t u, long u_stride,
             std::uintptr_t v, long v_stride, std::uintptr_t add, long add_stride, std::uintptr_t out,
             long out_stride) {
  const StepSizes<T> sizes(h, hs, hs_stride);
  const Functions<T>& table = functions<T>();
  T* scratch = room<T>(table.scratch_size(layer, 1));
  for (long k = 0; k < m; k++) {
    const Adjoint<T> one = {sizes[k],
                            at<T>(theta) + k * theta_stride,
                            at<T>(u) + k * u_stride,
                            add ? at<T>(add) + k * add_stride : nullptr,
                            out ? at<T>(out) + k * out_stride : nullptr,
                            gradient ? at<T>(gradient) + k * gradient_stride : nullptr};
    table.adjoints(layer, B, 1, &one, at<T>(v) + k * v_stride, k + 1 < m ? one.u + u_stride : nullptr, scratch);
  }
}

// c steps from the beginning of each interval to its end, each of `parts` steps with rows of weights of their own.
// `inputs`, if given, gets the input of every step; tau is added to its output.
template <class T>
void relax(Layer layer, long m, long c, long parts, long B, double h, std::uintptr_t hs, long hs_stride,
           std::uintptr_t theta, long theta_stride, std::uintptr_t points, long points_stride, std::uintptr_t tau,
           long tau_stride, std::uintptr_t inputs, long inputs_stride, std::uintptr_t ends, long ends_stride) {
  const StepSizes<T> sizes(h, hs, hs_stride);
  const Functions<T>& table = functions<T>();
  T* scratch = room<T>(table.scratch_size(layer, 1));
  const std::size_t bytes = std::size_t(layer.inputs) * B * sizeof(T);
  for (long k = 0; k < m; k++) {
    T* const end = at<T>(ends) + k * ends_stride;
    const T* x = at<T>(points) + k * points_stride;
    for (long row = k * c; row < (k + 1) * c; row++) {
      T* target = end;
      if (inputs) {
        T* input = at<T>(inputs) + row * inputs_stride;
        if (input != x) std::memcpy(input, x, bytes);
        x = input;
        if (row + 1 < (k + 1) * c) target = input + inputs_stride;
      }
      for (long part = row * parts; part < (row + 1) * parts; part++) {
        const bool last = part + 1 == (row + 1) * parts;
        table.step(layer, B, sizes[part], at<T>(theta) + part * theta_stride, x,
                   tau && last ? at<T>(tau) + row * tau_stride : nullptr, target, scratch);
        x = target;
      }
    }
  }
}

// The same backwards: adjoints from the end of each interval to its beginning. States and gradient have a row for each part.
template <class T>
void relax_adjoint(Layer layer, long m, long c, long parts, long B, double h, std::uintptr_t hs, long hs_stride,
                   std::uintptr_t theta, long theta_stride, std::uintptr_t gradient, long gradient_stride,
                   std::uintptr_t states, long states_stride, std::uintptr_t points, long points_stride,
                   std::uintptr_t tau, long tau_stride, std::uintptr_t inputs, long inputs_stride, std::uintptr_t ends,
                   long ends_stride) {
  const StepSizes<T> sizes(h, hs, hs_stride);
  const Functions<T>& table = functions<T>();
  const long layers = c * parts, most = at_once(table, layer, layers);
  T* scratch = room<T>(table.scratch_size(layer, most));
  const std::size_t bytes = std::size_t(layer.inputs) * B * sizeof(T);
  std::vector<Adjoint<T>> steps(layers);
  for (long k = 0; k < m; k++) {
    T* const end = at<T>(ends) + k * ends_stride;
    const T* v = at<T>(points) + k * points_stride;
    T* const input = inputs ? at<T>(inputs) + ((k + 1) * c - 1) * inputs_stride : nullptr;
    if (input && input != v) {
      std::memcpy(input, v, bytes);
      v = input;
    }
    for (long i = 0; i < layers; i++) {
      const long part = (k + 1) * layers - 1 - i, row = i / parts;
      const bool last = (i + 1) % parts == 0;
      T* const next = input && last ? input - (row + 1) * inputs_stride : nullptr;
      steps[i] = {sizes[part],
                  at<T>(theta) + part * theta_stride,
                  at<T>(states) + part * states_stride,
                  tau && last ? at<T>(tau) + ((k + 1) * c - 1 - row) * tau_stride : nullptr,
                  i + 1 == layers ? end : next,
                  gradient ? at<T>(gradient) + part * gradient_stride : nullptr};
    }
    for (long first = 0; first < layers; first += most) {
      const long count = std::min(most, layers - first);
      Adjoint<T>& last = steps[first + count - 1];
      if (!last.out) last.out = end;
      const T* const after = first + count < layers ? last.u - states_stride
                             : k + 1 < m            ? at<T>(states) + ((k + 2) * layers - 1) * states_stride
                                                    : nullptr;
      table.adjoints(layer, B, count, &steps[first], v, after, scratch);
      v = last.out;
    }
  }
}

template <class T>
void distances(long m, long n, std::uintptr_t a, long a_stride, std::uintptr_t b, long b_stride, std::uintptr_t sums) {
  const Functions<T>& table = functions<T>();
  for (long k = 0; k < m; k++)
    table.distance(n, at<T>(a) + k * a_stride, at<T>(b) + k * b_stride, at<T>(sums) + 2 * k);
}

template <class T>
void move(long m, long n, std::uintptr_t a, long a_stride, std::uintptr_t b, long b_stride, std::uintptr_t c,
          long c_stride, std::uintptr_t difference, long difference_stride, std::uintptr_t sums) {
  const Functions<T>& table = functions<T>();
  for (long k = 0; k < m; k++)
    table.move(n, at<T>(a) + k * a_stride, at<T>(b) + k * b_stride, c ? at<T>(c) + k * c_stride : nullptr,
               difference ? at<T>(difference) + k * difference_stride : nullptr, at<T>(sums) + 2 * k);
}

// The sum of the losses, and how many samples are classified rightly: -1 if there is a label that is no class.
template <class T>
std::pair<double, long> cross_entropy(Layer layer, long B, std::uintptr_t theta, std::uintptr_t u,
                                      std::uintptr_t labels, std::uintptr_t slope, long slope_stride) {
  const long long* const label = at<const long long>(labels);
  bool classes = true;
  for (long s = 0; s < B; s++) classes &= label[s] >= 0 && label[s] < layer.outputs;
  if (!classes) return {0.0, -1};
  const Functions<T>& table = functions<T>();
  double found[2];
  table.cross_entropy(layer, B, at<T>(theta), at<T>(u), label, at<T>(slope), slope_stride, found,
                      room<T>(table.scratch_size(layer, 1)));
  return {found[0], long(found[1])};
}

typedef std::vector<std::uintptr_t> Addresses;

template <class T>
std::vector<const T*> pointers(const Addresses& addresses) {
  std::vector<const T*> found;
  for (const std::uintptr_t address : addresses) found.push_back(at<T>(address));
  return found;
}

template <class T>
void products(const Addresses& a, const Addresses& b, const std::vector<long>& bounds, std::uintptr_t found) {
  functions<T>().products(a.size(), pointers<T>(a).data(), b.size(), pointers<T>(b).data(), bounds.size() - 1,
                          bounds.data(), at<T>(found), room<T>(a.size() * b.size() * 64 / sizeof(T)));
}

template <class T>
void combine(long n, const std::vector<double>& coefficients, const Addresses& vectors, std::uintptr_t out) {
  functions<T>().combine(n, coefficients.size(), coefficients.data(), pointers<T>(vectors).data(), at<T>(out));
}

template <class T>
void bind(nb::module_& m, const std::string& suffix) {
  const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
  m.def(("step_" + suffix).c_str(), &step<T>, unlocked);
  m.def(("adjoint_" + suffix).c_str(), &adjoint<T>, unlocked);
  m.def(("relax_" + suffix).c_str(), &relax<T>, unlocked);
  m.def(("relax_adjoint_" + suffix).c_str(), &relax_adjoint<T>, unlocked);
  m.def(("distances_" + suffix).c_str(), &distances<T>, unlocked);
  m.def(("move_" + suffix).c_str(), &move<T>, unlocked);
  m.def(("cross_entropy_" + suffix).c_str(), &cross_entropy<T>, unlocked);
  m.def(("products_" + suffix).c_str(), &products<T>, unlocked);
  m.def(("combine_" + suffix).c_str(), &combine<T>, unlocked);
}

}  // namespace

NB_MODULE(_native, m) {
  // What native.py asks for: the next number where the arguments of a function change.
  m.attr("INTERFACE") = 4;
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<int, int, int, int, int, int>(), nb::arg("inputs"), nb::arg("outputs"), nb::arg("activation"),
           nb::arg("scalar_bias"), nb::arg("residual"), nb::arg("midpoint"));
  m.def("instruction_sets", &instruction_sets);
  m.def("active", [] { return std::string(active.load()->name); });
  m.def("max_width", [] { return active.load()->max_width; });
  m.def("use", &use, nb::arg("name"));
  bind<double>(m, "float64");
  bind<float>(m, "float32");
}
