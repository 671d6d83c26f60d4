// Focal loss by its definition, in long double.
#pragma once

#include <vector>

#include "check.h"

namespace fastremedy::check {

using Wide = long double;

// A loss, its derivative, and the size of the terms that the derivative is the sum of.
struct Exact {
  Wide loss = 0, slope = 0, magnitude = 0;
};

inline Wide softplus_exactly(Wide x) {
  return std::max(x, Wide{0}) + std::log1p(std::exp(-std::fabs(x)));
}

// FL = alpha_t (1 - p_t)^gamma CE, where p_t, alpha_t and CE are those of 0 and 1, mixed.
inline Exact sigmoid_focal_exactly(Wide x, Wide target, Wide gamma, Wide positive, Wide negative,
                                   Wide pos_weight) {
  const Wide p = std::exp(-softplus_exactly(-x)), not_p = std::exp(-softplus_exactly(x));
  const Wide q = target * not_p + (1 - target) * p;
  const Wide q_slope = (1 - 2 * target) * p * not_p;
  const Wide ce = pos_weight * target * softplus_exactly(-x) + (1 - target) * softplus_exactly(x);
  const Wide ce_slope = (1 - target) * p - pos_weight * target * not_p;
  const Wide factor = (positive * target + negative * (1 - target)) * std::pow(q, gamma);
  const Wide of_q = gamma == 0 ? 0 : gamma * q_slope / q * ce;
  return {factor * ce, factor * (of_q + ce_slope),
          factor * (std::fabs(of_q) + (1 - target) * p + pos_weight * target * not_p)};
}

// One row: the loss, and for every class the derivative with the size of its terms.
struct ExactRow {
  Wide loss = 0;
  std::vector<Exact> classes;
  std::vector<Wide> probabilities;
};

// weights: what multiplies (1 - p)^gamma CE of each class, its target included.
inline ExactRow softmax_focal_exactly(const std::vector<Wide>& x, const std::vector<Wide>& weights,
                                      Wide gamma) {
  const size_t n = x.size();
  const size_t largest = std::max_element(x.begin(), x.end()) - x.begin();
  Wide rest = 0;
  for (size_t c = 0; c < n; ++c) rest += c == largest ? 0 : std::exp(x[c] - x[largest]);
  ExactRow row;
  row.classes.resize(n);
  std::vector<Wide> q(n), slopes(n);
  Wide sum = 0;
  for (size_t c = 0; c < n; ++c) {
    const Wide p = std::exp(x[c] - x[largest]) / (1 + rest);
    const Wide ce = x[largest] - x[c] + std::log1p(rest);
    q[c] = c == largest ? rest / (1 + rest) : 1 - p;
    row.probabilities.push_back(p);
    if (weights[c] == 0) continue;
    const Wide factor = weights[c] * std::pow(q[c], gamma);
    row.loss += factor * ce;
    slopes[c] = factor * (1 + gamma * p * (q[c] > 0 ? ce / q[c] : 1));
    sum += slopes[c];
  }
  for (size_t c = 0; c < n; ++c) {
    const Wide others = row.probabilities[c] * (sum - slopes[c]), own = q[c] * slopes[c];
    row.classes[c] = {0, others - own, others + own};
  }
  return row;
}

}  // namespace fastremedy::check
