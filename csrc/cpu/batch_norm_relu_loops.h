// The loops over the elements of a tile, for the compiler to vectorise.
//
// Rows are of one channel each, and what belongs to a channel is the same along a row. In columns
// every element has its own. Both go through the same formula.
#pragma once

#include "../core/batch_norm_relu.h"
#include "blocks.h"
#include "simd.h"

namespace fastremedy::cpu {

// Addresses of what belongs to channels; [r] for row r of a tile, [i] for column i.
template <class T>
struct Normalizers {
  const T *mean, *scale, *shift;
  Normalizer<T> operator[](int64_t i) const { return {mean[i], scale[i], shift[i]}; }
};

template <class T>
struct InputGrads {
  const T *g_scale, *x_scale, *shift;
};

// Elements to read, and those to read later: they are asked for line by line. Left to the hardware,
// a core comes to read as far ahead as it can start instructions, 3 KB in these loops: sums of
// (32, 64, 56, 56) then take 1.0 ms instead of 0.4.
template <class T>
struct Source {
  const T* values;
  const T* later;

  inline __attribute__((always_inline)) void ask(int64_t i) const { __builtin_prefetch(later + i); }
  void advance(int64_t n) {
    values += n;
    later += n;
  }
};

// What the activation needs to know beside z.
template <class T>
struct ActivationOptions {
  T threshold;
  T negative_slope;
};

// ask(i) for every line, and element(i) for all of its elements.
template <class T, class Ask, class Element>
inline __attribute__((always_inline)) void for_each_in_row(int64_t n, const Ask& ask,
                                                           const Element& element) {
  int64_t i = 0;
  for (; i + kNumLanes<T> <= n; i += kNumLanes<T>) {
    ask(i);
#pragma omp simd
    for (int64_t lane = 0; lane < kNumLanes<T>; ++lane) element(i + lane);
  }
#pragma omp simd
  for (int64_t rest = i; rest < n; ++rest) element(rest);
}

// element(i, k) for all elements i, k being their place in a period of `width` columns. What
// belongs to a column stays in registers on the way down; lines are asked for in memory's order.
template <class T, class Ask, class Element>
inline __attribute__((always_inline)) void for_each_in_columns(int64_t n, int64_t width,
                                                               const Ask& ask,
                                                               const Element& element) {
  if (n == width) {
    for_each_in_row<T>(n, ask, [&](int64_t i) __attribute__((always_inline)) { element(i, i); });
    return;
  }
  for (int64_t k = 0, line = 0; k < width; k += kNumLanes<T>) {
    for (int64_t i = k; i < n; i += width, line += kNumLanes<T>) {
      ask(line);
#pragma omp simd
      for (int64_t lane = 0; lane < kNumLanes<T>; ++lane) element(i + lane, k + lane);
    }
  }
}

// By halves: both at once go through the stack, which takes longer than a column.
template <class T>
inline __attribute__((always_inline)) void add_lanes(Lanes<T> lanes, T* sums) {
  lanes.add(Lanes<T>::load(sums));
  std::memcpy(sums, &lanes.low, sizeof(lanes.low));
  std::memcpy(sums + kNumLanes<T> / 2, &lanes.high, sizeof(lanes.high));
}

// Adds the two values of element(i, k, &first, &second) to firsts[k] and seconds[k].
template <class T, class Ask, class Element>
inline __attribute__((always_inline)) void sum_in_columns(int64_t n, int64_t width,
                                                          T* __restrict firsts,
                                                          T* __restrict seconds, const Ask& ask,
                                                          const Element& element) {
  if (n == width) {
    for_each_in_row<T>(n, ask, [&](int64_t i) __attribute__((always_inline)) {
      T first, second;
      element(i, i, &first, &second);
      firsts[i] += first;
      seconds[i] += second;
    });
    return;
  }
  for (int64_t k = 0, line = 0; k < width; k += kNumLanes<T>) {
    Lanes<T> sum, other_sum;
    for (int64_t i = k; i < n; i += width, line += kNumLanes<T>) {
      ask(line);
      T first[kNumLanes<T>], second[kNumLanes<T>];
#pragma omp simd
      for (int64_t lane = 0; lane < kNumLanes<T>; ++lane) {
        element(i + lane, k + lane, &first[lane], &second[lane]);
      }
      sum.add(Lanes<T>::load(first));
      other_sum.add(Lanes<T>::load(second));
    }
    add_lanes(sum, firsts + k);
    add_lanes(other_sum, seconds + k);
  }
}

// --- forward ---

// Adds the first n elements of each row, at most kPilotElements.
template <class T>
FASTREMEDY_CLONES void sum_heads(const T* x, int64_t row_size, int64_t num_rows, int64_t n,
                                 T* sums) {
  for (int64_t r = 0; r < num_rows; ++r, x += row_size) {
    if (n == kPilotElements) {
      sums[r] += sum_of<kPilotElements>(x);
    } else {
      for (int64_t i = 0; i < n; ++i) sums[r] += x[i];
    }
  }
}

template <class T>
FASTREMEDY_CLONES void sum_rows(Source<T> input, int64_t row_size, int64_t num_rows,
                                const T* pilots, double* sums, double* sums_of_squares) {
  for (int64_t r = 0; r < num_rows; ++r, input.advance(row_size)) {
    const T* __restrict x = input.values;
    const T pilot = pilots[r];
    Lanes<T> sum, sum_of_squares;
    int64_t i = 0;
    for (; i + kNumLanes<T> <= row_size; i += kNumLanes<T>) {
      input.ask(i);
      T d[kNumLanes<T>];
#pragma omp simd
      for (int64_t lane = 0; lane < kNumLanes<T>; ++lane) d[lane] = x[i + lane] - pilot;
      sum.add(Lanes<T>::load(d));
      sum_of_squares.add_squares(Lanes<T>::load(d));
    }
    T rest = 0, rest_of_squares = 0;
    for (; i < row_size; ++i) {
      const T d = x[i] - pilot;
      rest += d;
      rest_of_squares += d * d;
    }
    sums[r] += sum_of(sum) + rest;
    sums_of_squares[r] += sum_of(sum_of_squares) + rest_of_squares;
  }
}

template <class T>
FASTREMEDY_CLONES void sum_columns(Source<T> input, int64_t n, int64_t width,
                                   const T* __restrict pilots, T* __restrict sums,
                                   T* __restrict sums_of_squares) {
  const T* __restrict x = input.values;
  const auto ask = [&](int64_t i) __attribute__((always_inline)) { input.ask(i); };
  sum_in_columns(n, width, sums, sums_of_squares, ask,
                 [&](int64_t i, int64_t k, T* sum, T* sum_of_squares)
                     __attribute__((always_inline)) {
                       const T d = x[i] - pilots[k];
                       *sum = d;
                       *sum_of_squares = d * d;
                     });
}

// y = activation(normalize(x) + residual); without kAdds there is no residual.
template <Activation kActivation, bool kAdds, class T>
FASTREMEDY_CLONES void normalize_rows(Source<T> input, Source<T> residual, T* __restrict y,
                                      int64_t row_size, int64_t num_rows, Normalizers<T> channels,
                                      ActivationOptions<T> options) {
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  const auto ask = [&](int64_t i) __attribute__((always_inline)) {
    input.ask(i);
    if (kAdds) residual.ask(i);
  };
  for (int64_t r = 0; r < num_rows; ++r, y += row_size) {
    const T* __restrict x = input.values, * __restrict added = residual.values;
    const Normalizer<T> c = channels[r];
    for_each_in_row<T>(row_size, ask, [&](int64_t i) __attribute__((always_inline)) {
      const T z = normalize(x[i], c.mean, c.scale, c.shift);
      y[i] = activate<kActivation>(kAdds ? z + added[i] : z, threshold, negative_slope);
    });
    input.advance(row_size);
    if (kAdds) residual.advance(row_size);
  }
}

template <Activation kActivation, bool kAdds, class T>
FASTREMEDY_CLONES void normalize_columns(Source<T> input, Source<T> residual, T* __restrict y,
                                         int64_t n, int64_t width, Normalizers<T> c,
                                         ActivationOptions<T> options) {
  const T* __restrict x = input.values, * __restrict added = residual.values;
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  const auto ask = [&](int64_t i) __attribute__((always_inline)) {
    input.ask(i);
    if (kAdds) residual.ask(i);
  };
  for_each_in_columns<T>(n, width, ask, [&](int64_t i, int64_t k) __attribute__((always_inline)) {
    const T z = normalize(x[i], c.mean[k], c.scale[k], c.shift[k]);
    y[i] = activate<kActivation>(kAdds ? z + added[i] : z, threshold, negative_slope);
  });
}

template <class T>
FASTREMEDY_CLONES void add_to(T* __restrict z, Source<T> residual, int64_t n) {
  const T* __restrict r = residual.values;
  const auto ask = [&](int64_t i) __attribute__((always_inline)) { residual.ask(i); };
  for_each_in_row<T>(n, ask, [&](int64_t i) __attribute__((always_inline)) { z[i] += r[i]; });
}

template <Activation kActivation, class T>
FASTREMEDY_CLONES void activate_all(const T* __restrict z, T* __restrict y, int64_t n,
                                    ActivationOptions<T> options) {
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  for (int64_t i = 0; i < n; ++i) y[i] = activate<kActivation>(z[i], threshold, negative_slope);
}

// Each flag is 0 or 1.
template <class T>
FASTREMEDY_CLONES void find_positive(const T* __restrict z, uint8_t* __restrict flags, int64_t n,
                                     T threshold) {
  for (int64_t i = 0; i < n; ++i) flags[i] = is_positive(z[i], threshold);
}

template <Activation kActivation, class T>
FASTREMEDY_CLONES void find_kept(const T* __restrict z, uint8_t* __restrict flags, int64_t n,
                                 T threshold) {
  for (int64_t i = 0; i < n; ++i) flags[i] = keeps_grad<kActivation>(z[i], threshold);
}

// --- backward ---

template <Activation kActivation, class T>
FASTREMEDY_CLONES_WITHOUT_MASKS void sum_grad_rows(Source<T> input, Source<T> grad_output,
                                                   int64_t row_size, int64_t num_rows,
                                                   Normalizers<T> channels,
                                                   ActivationOptions<T> options, double* sums_g,
                                                   double* sums_gx) {
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  for (int64_t r = 0; r < num_rows; ++r, input.advance(row_size), grad_output.advance(row_size)) {
    const T* __restrict x = input.values, * __restrict grad = grad_output.values;
    const Normalizer<T> c = channels[r];
    const auto grad_at = [&](int64_t i) {
      const T z = normalize(x[i], c.mean, c.scale, c.shift);
      return activation_grad<kActivation>(z, grad[i], threshold, negative_slope);
    };
    Lanes<T> sum_g, sum_gx;
    int64_t i = 0;
    for (; i + kNumLanes<T> <= row_size; i += kNumLanes<T>) {
      input.ask(i);
      grad_output.ask(i);
      T g[kNumLanes<T>], gx[kNumLanes<T>];
#pragma omp simd
      for (int64_t lane = 0; lane < kNumLanes<T>; ++lane) {
        g[lane] = grad_at(i + lane);
        gx[lane] = g[lane] * (x[i + lane] - c.mean);
      }
      sum_g.add(Lanes<T>::load(g));
      sum_gx.add(Lanes<T>::load(gx));
    }
    T rest_g = 0, rest_gx = 0;
    for (; i < row_size; ++i) {
      const T g = grad_at(i);
      rest_g += g;
      rest_gx += g * (x[i] - c.mean);
    }
    sums_g[r] += sum_of(sum_g) + rest_g;
    sums_gx[r] += sum_of(sum_gx) + rest_gx;
  }
}

template <Activation kActivation, class T>
FASTREMEDY_CLONES_WITHOUT_MASKS void sum_grad_columns(Source<T> input, Source<T> grad_output,
                                                      int64_t n, int64_t width, Normalizers<T> c,
                                                      ActivationOptions<T> options,
                                                      T* __restrict sums_g, T* __restrict sums_gx) {
  const T* __restrict x = input.values, * __restrict grad = grad_output.values;
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  const auto ask = [&](int64_t i) __attribute__((always_inline)) {
    input.ask(i);
    grad_output.ask(i);
  };
  sum_in_columns(n, width, sums_g, sums_gx, ask,
                 [&](int64_t i, int64_t k, T* g, T* gx) __attribute__((always_inline)) {
                   const T z = normalize(x[i], c.mean[k], c.scale[k], c.shift[k]);
                   *g = activation_grad<kActivation>(z, grad[i], threshold, negative_slope);
                   *gx = *g * (x[i] - c.mean[k]);
                 });
}

template <Activation kActivation, bool kBatchStatistics, class T>
FASTREMEDY_CLONES_WITHOUT_MASKS void input_grad_rows(Source<T> input, Source<T> grad_output,
                                                     T* __restrict dx, int64_t row_size,
                                                     int64_t num_rows, Normalizers<T> channels,
                                                     InputGrads<T> d,
                                                     ActivationOptions<T> options) {
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  const auto ask = [&](int64_t i) __attribute__((always_inline)) {
    input.ask(i);
    grad_output.ask(i);
  };
  for (int64_t r = 0; r < num_rows; ++r, dx += row_size) {
    const T* __restrict x = input.values, * __restrict grad = grad_output.values;
    const Normalizer<T> c = channels[r];
    const T g_scale = d.g_scale[r], x_scale = d.x_scale[r], shift = d.shift[r];
    for_each_in_row<T>(row_size, ask, [&](int64_t i) __attribute__((always_inline)) {
      const T z = normalize(x[i], c.mean, c.scale, c.shift);
      const T g = activation_grad<kActivation>(z, grad[i], threshold, negative_slope);
      dx[i] = input_grad_of(kBatchStatistics, g, x[i] - c.mean, g_scale, x_scale, shift);
    });
    input.advance(row_size);
    grad_output.advance(row_size);
  }
}

template <Activation kActivation, bool kBatchStatistics, class T>
FASTREMEDY_CLONES_WITHOUT_MASKS void input_grad_columns(Source<T> input, Source<T> grad_output,
                                                        T* __restrict dx, int64_t n, int64_t width,
                                                        Normalizers<T> c, InputGrads<T> d,
                                                        ActivationOptions<T> options) {
  const T* __restrict x = input.values, * __restrict grad = grad_output.values;
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  const auto ask = [&](int64_t i) __attribute__((always_inline)) {
    input.ask(i);
    grad_output.ask(i);
  };
  for_each_in_columns<T>(n, width, ask, [&](int64_t i, int64_t k) __attribute__((always_inline)) {
    const T z = normalize(x[i], c.mean[k], c.scale[k], c.shift[k]);
    const T g = activation_grad<kActivation>(z, grad[i], threshold, negative_slope);
    dx[i] = input_grad_of(kBatchStatistics, g, x[i] - c.mean[k], d.g_scale[k], d.x_scale[k],
                          d.shift[k]);
  });
}

template <Activation kActivation, class T>
FASTREMEDY_CLONES void find_activation_grads(const T* __restrict z, const T* __restrict grad,
                                             T* __restrict g, int64_t n,
                                             ActivationOptions<T> options) {
  const T threshold = options.threshold, negative_slope = options.negative_slope;
  for (int64_t i = 0; i < n; ++i) {
    g[i] = activation_grad<kActivation>(z[i], grad[i], threshold, negative_slope);
  }
}

}  // namespace fastremedy::cpu
