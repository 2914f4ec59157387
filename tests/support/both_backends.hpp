// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "device.hpp"
#include "support/tolerance.hpp"

#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/core/transfer.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/surroundings.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

// A layer or a scorer on a device beside itself on the host: forward and backward with the same
// weights, tokens and gradients. Everything in double, so that rounding does not change a choice.

namespace talpa::support {

/// What a layer or a scorer is run on.
struct parity_sizes {
  index tokens = 9;
  index inputs = 6;
  index outputs = 5;  ///< of a scorer: experts. A layer says it itself
  bool padded = true;
  index sequence_length = 0;     ///< a divisor of tokens; 0: one sequence
  index classes = 0;             ///< labels go round 0..classes - 1; 0: none
  index conditioning_rows = 0;   ///< rows of each sequence, some of them absent; 0: none
  index conditioning_width = 0;  ///< C
  /// What the error of an output may be in units of the largest number of a run: the gates that it
  /// is made with are as uncertain as the absolute terms of a logit add up to, here to less than
  /// this.
  double amplification = 32.0;
  /// A gradient that is zero but for rounding errors; weights may begin with zeros anyway.
  std::string zero{};
};

/// What one run leaves behind, on the host, in a fixed order.
class run_record {
 public:
  struct entry {
    std::string name;
    matrix<double, cpu> value;
    bool may_be_zero;
  };

  template <class T, class B>
  void add(std::string name, matrix_view<T, B> value, bool may_be_zero = false) {
    entries_.push_back({std::move(name), to_host(value), may_be_zero});
  }
  template <class B>
  void add_mask(matrix_view<const std::uint32_t, B> mask) {
    const auto words = to_host(mask);
    masks_.insert(masks_.end(), words.data(), words.data() + words.size());
  }
  /// `longest` roundings on the way to one of them.
  void take_roundings(double longest) { roundings_ = std::max(roundings_, longest); }

  double roundings() const { return roundings_; }
  double largest() const {
    double most = 1.0;
    for (const entry& e : entries_) most = std::max(most, testing::largest(e.value.view()));
    return most;
  }
  const std::vector<entry>& entries() const { return entries_; }
  const std::vector<std::uint32_t>& masks() const { return masks_; }

 private:
  std::vector<entry> entries_;
  std::vector<std::uint32_t> masks_;
  double roundings_ = 0.0;
};

/// Empty when a run made the same choices as another and numbers within `bound` of its. Results
/// that are all near the bound prove nothing, and are no good unless they may be zero.
inline std::string record_difference(const run_record& found, const run_record& expected,
                                     double bound) {
  if (found.masks() != expected.masks()) return "another choice";
  if (found.entries().size() != expected.entries().size()) return "another number of results";
  for (std::size_t i = 0; i < expected.entries().size(); ++i) {
    const auto& a = found.entries()[i];
    const auto& b = expected.entries()[i];
    if (a.name != b.name) return a.name + " instead of " + b.name;
    const std::string text =
        testing::first_excess(a.value.view(), b.value.view(), [&](index, index) { return bound; });
    if (!text.empty()) return b.name + ": " + text;
    if (!b.may_be_zero && testing::largest(b.value.view()) < 1e3 * bound) {
      return b.name + " is all rounding errors";
    }
  }
  return "";
}

namespace detail {

template <class B>
void wait(context<B>& ctx) {
  if constexpr (requires { ctx.synchronise(); }) ctx.synchronise();
}

/// Numbers of the host on B, without their signs where `absolute`.
template <class B>
matrix<double, B> uneven_on(index rows, index cols, generator& random, double scale,
                            bool absolute) {
  matrix<double, cpu> m = testing::uneven<double>(rows, cols, random, scale);
  for (index i = 0; absolute && i < m.size(); ++i) m.data()[i] = std::abs(m.data()[i]);
  return to_device<B>(m.view());
}

/// testing::detail::surroundings on B, with padding.
template <class B>
struct surroundings_on {
  surroundings_on(const parity_sizes& sizes, generator& random, bool absolute)
      : host(sizes, sizes.tokens), real(sizes.padded ? sizes.tokens : 0) {
    for (index n = 0; n < real.size(); ++n) real[n] = n % 4 == 2 ? 0 : 1;
    padding = to_device<B>(as_column(real.view()));
    labels = to_device<B>(as_column(host.labels.view()));
    present = to_device<B>(as_column(host.present.view()));
    rows = uneven_on<B>(host.rows.rows(), host.rows.cols(), random, 1.0, absolute);
    drows = matrix<double, B>(rows.rows(), rows.cols());
  }
  batch_info<double, B> batch(generator& noise) {
    batch_info<double, B> b;
    b.padding_mask = {padding.data(), padding.rows()};
    b.sequence_length = host.sequence_length;
    b.random = &noise;
    b.labels = {labels.data(), labels.rows()};
    b.conditioning = {std::as_const(rows).view(), {present.data(), present.rows()}, drows.view()};
    return b;
  }

  testing::detail::surroundings<double> host;
  vector<std::uint8_t, cpu> real;
  matrix<std::uint8_t, B> padding, present;
  matrix<std::int32_t, B> labels;
  matrix<double, B> rows, drows;
};

/// Gradients that losses would have of a routing: any numbers of its shapes.
template <class B>
struct loss_gradients {
  loss_gradients(const routed_view<double, B>& routed, generator& random, bool absolute) {
    const index tokens = routed.logits.rows, experts = routed.logits.cols;
    for (auto& m : all) m = uneven_on<B>(tokens, experts, random, 0.5, absolute);
    control = uneven_on<B>(routed.control.rows, routed.control.cols, random, 0.5, absolute);
    view.dlogits = all[0].view();
    view.dgates = all[1].view();
    view.dcontrol = control.view();
    if (routed.noise.deviation.empty()) return;
    view.dnoise = {all[2].view(), all[3].view()};
  }
  matrix<double, B> all[4], control;
  routed_gradient<double, B> view;
};

template <class Saved>
concept routed_saved = requires(const Saved& s) {
  s.routed.routing.mask;
};

/// NaN in the memory that a run will be given: nobody may look at what nobody wrote.
template <class B>
void poison(context<B>& ctx) {
  for (workspace<B>* const memory : {&ctx.memory, &ctx.scratch}) {
    const typename workspace<B>::scope scope(*memory);
    const auto all = memory->template take<double>(1, index{1} << 16);
    ops::fill(ctx, std::numeric_limits<double>::quiet_NaN(), all);
  }
  wait(ctx);
}

/// One run on B: at inference, then forward and backward in training. `make.template
/// operator()<B>(generator)` returns parameters, which begin as themselves and go on with other
/// numbers, those of their biases included.
template <class B, class Layer, class Make>
run_record run_on(context<B>& ctx, const Layer& layer, const Make& make, const parity_sizes& sizes,
                  bool absolute) {
  run_record out;
  poison(ctx);
  generator first(3), random(5);
  auto p = make.template operator()<B>(first);
  index longest = sizes.tokens;
  p.visit([&](parameter<double, B>& q) {
    out.add(q.name() + " at first", std::as_const(q).value(), true);
    const auto other = uneven_on<cpu>(q.rows(), q.cols(), random, 0.5, absolute);
    to_device<double, B>(other.view(), q.value());
    longest = std::max(longest, q.rows() + q.cols());
  });
  // Products of a layer lie behind one another, at most four of them, with softmax and activation
  // between: 64.
  out.take_roundings(4.0 * static_cast<double>(longest) + 64.0);

  index outputs = sizes.outputs;
  if constexpr (requires { layer.output_width(p); }) outputs = layer.output_width(p);
  const auto x = uneven_on<B>(sizes.tokens, sizes.inputs, random, 1.0, absolute);
  const auto dy = uneven_on<B>(sizes.tokens, outputs, random, 1.0, absolute);
  surroundings_on<B> around(sizes, random, absolute);
  matrix<double, B> y(sizes.tokens, outputs), dx(sizes.tokens, sizes.inputs);
  const auto add = [&](const std::string& name, matrix_view<const double, B> value) {
    out.add(name, value, sizes.tokens == 0 || name == sizes.zero);
  };
  const typename workspace<B>::scope scope(ctx.memory);
  for (const mode m : {mode::inference, mode::training}) {
    generator noise(7);
    const batch_info<double, B> batch = around.batch(noise);
    const auto kept = layer.forward(ctx, p, x, y.view(), m, batch);
    wait(ctx);
    add(m == mode::inference ? "y at inference" : "y", y);
    if constexpr (routed_saved<decltype(kept)>) {
      out.add_mask(kept.routed.routing.mask);
      add(m == mode::inference ? "gates at inference" : "gates", kept.routed.routing.gates);
    }
    if (m == mode::inference) continue;
    const auto backward = [&](const auto*... from_losses) {
      layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite, from_losses...);
      wait(ctx);
    };
    const auto gradients = [&](const auto& routed) {
      return loss_gradients<B>(routed, random, absolute);
    };
    if constexpr (routed_saved<decltype(kept)>) {
      const auto of_router = gradients(kept.routed);
      backward(&of_router.view);
    } else if constexpr (requires { kept.base.routed; }) {
      out.add_mask(kept.base.routed.routing.mask);
      out.add_mask(kept.placement.routing.mask);
      const auto of_base = gradients(kept.base.routed);
      if constexpr (requires { kept.placement.routed; }) {
        const auto of_placement = gradients(kept.placement.routed);
        backward(&of_placement.view, &of_base.view);
      } else {
        backward(static_cast<const routed_gradient<double, B>*>(nullptr), &of_base.view);
      }
    } else {
      backward();
    }
  }
  add("dx", dx);
  p.visit([&](parameter<double, B>& q) {
    if (q.trainable()) add(q.name(), q.grad());
  });
  if (sizes.conditioning_rows > 0) add("conditioning", around.drows);
  return out;
}

}  // namespace detail

/// Empty when a layer or a scorer does on a device what it does on the host: the same choices,
/// values and gradients that differ by no more than rounding can make them. Each result takes at
/// most `roundings` roundings, one after another, of numbers no larger than those of a run in which
/// nothing cancels, because tokens, weights and gradients have no signs.
template <class Layer, class Make>
std::string backend_difference(const Layer& layer, const Make& make,
                               const parity_sizes& sizes = {}) {
  context<cpu> host(1);
  context<device> ctx;
  const run_record expected = detail::run_on<cpu>(host, layer, make, sizes, false);
  // What a layer reads without having written it must not be there by luck.
  for (workspace<device>* const memory : {&ctx.memory, &ctx.scratch}) {
    const workspace<device>::scope scope(*memory);
    ops::fill(ctx, std::numeric_limits<double>::quiet_NaN(),
              memory->take<double>(index{512}, index{512}));
  }
  const run_record found = detail::run_on<device>(ctx, layer, make, sizes, false);
  const double size = detail::run_on<cpu>(host, layer, make, sizes, true).largest();
  return record_difference(
      found, expected, rounding_bound<double>(expected.roundings(), sizes.amplification * size));
}

/// Empty when `run(ctx, random, record)` leaves the same choices on both backends, and numbers that
/// differ by at most `roundings` roundings of the largest.
template <class Run>
std::string recorded(const Run& run, double roundings) {
  run_record found, expected;
  context<cpu> host(1);
  context<device> ctx;
  generator one(3), two(3);
  run(host, one, expected);
  run(ctx, two, found);
  return record_difference(found, expected, rounding_bound<double>(roundings, expected.largest()));
}

/// Other numbers in the place of zeros.
template <class B, class Params>
void fill_parameters(Params& p, generator& random) {
  p.visit([&](parameter<double, B>& q) { fill_uniform(q.value(), 0.5, random); });
}

}  // namespace talpa::support
