// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/expert_subject.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/parameters.hpp>
#include <talpa/testing/report.hpp>
#include <talpa/testing/subject.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace talpa::testing {

/// What an expert promises beyond its declared members.
struct expert_claims {
  /// A bank as init makes it contributes exactly zero, as adapters do.
  bool fresh_is_zero = true;
  /// Rounding errors in units of gamma(D + O + N + E width + 8) times the result for absolute
  /// values of x, gates, weights and upstream gradients: 1 for products of these.
  double amplification = 1.0;
};

struct expert_sizes {
  index tokens = 19;
  index inputs = 6;
  index outputs = 5;
  index experts = 4;
};

namespace detail {

template <floating T>
class expert_trial {
 public:
  /// The same expert twice: gradients and bounds are made in double.
  expert_trial(const expert_subject<T>& expert, const expert_subject<double>& in_double,
               const expert_facts& facts, const expert_claims& claims, const expert_sizes& sizes,
               std::uint64_t seed)
      : expert_(expert),
        in_double_(in_double),
        facts_(facts),
        claims_(claims),
        sizes_(sizes),
        random_(seed) {}

  report run() {
    initialisation_laws<T>(out_, [&](generator& random, const std::string& prefix) {
      return expert_.init(sizes_.inputs, sizes_.outputs, sizes_.experts, random, prefix);
    });
    fresh();
    forms_agree();
    order_of_slots();
    experts_without_tokens();
    some_experts_train();
    frozen();
    rule_of_signs();
    same_bits();
    no_tokens();
    grouped_gradients();
    if (facts_.has_masked_form) masked_gradients();
    return out_;
  }

 private:
  template <class U>
  using params = parameter_bag<U>;
  using mask_matrix = matrix<std::uint32_t, cpu>;

  /// A batch with its routing. Expert 1 has no token where there are three or more, and some tokens
  /// have no expert.
  template <class U>
  struct batch {
    matrix<U, cpu> x;      // [N, D]
    matrix<U, cpu> gates;  // [N, E], zero where the mask is off
    mask_matrix mask;
    matrix<U, cpu> dy;  // [N, O]
  };
  template <class U>
  batch<U> make_batch(index tokens) {
    batch<U> b{uneven<U>(tokens, sizes_.inputs, random_),
               uneven<U>(tokens, sizes_.experts, random_),
               random_mask(tokens, sizes_.experts, 0.6, random_),
               uneven<U>(tokens, sizes_.outputs, random_)};
    for (index n = 0; n < tokens; ++n) {
      for (index e = 0; e < sizes_.experts; ++e) {
        // A gate of zero is legal where the mask is on.
        if (!bit(b.mask.view(), n, e) || n % 11 == 5) b.gates(n, e) = U{0};
      }
    }
    return b;
  }
  template <class U>
  params<U> make_params() {
    params<U> p = subject_in<U>(expert_, in_double_)
                      .init(sizes_.inputs, sizes_.outputs, sizes_.experts, random_, "");
    shake<U>(p, random_, 0.5);
    return p;
  }

  /// Results of one forward and backward, in either form, by token.
  template <class U>
  struct outcome {
    matrix<U, cpu> y;       // [N, O]
    matrix<U, cpu> dgates;  // [N, E]
    matrix<U, cpu> dx;      // [N, D]
    std::vector<matrix<U, cpu>> gradients;
  };

  /// The slots of a routing, in the order of ops::build_segments or with each expert's tokens
  /// reversed.
  template <class U>
  struct slot_list {
    segments<cpu> s;
    vector_view<U, cpu> gates;
  };
  template <class U>
  slot_list<U> make_slots(context<cpu>& ctx, const batch<U>& b, bool reversed) {
    const index count = ops::count_slots(ctx, b.mask.view(), sizes_.experts);
    slot_list<U> list;
    list.s = make_segments(ctx.memory, b.x.rows(), sizes_.experts, count);
    list.gates = ctx.memory.template take<U>(count);
    ops::build_segments(ctx, b.mask.view(), b.gates.view(), list.s, list.gates);
    if (!reversed) return list;
    const segments<cpu>& s = list.s;
    for (index i = 0; i < count; ++i) {
      // Slot j of expert e becomes the last but j.
      index e = 0;
      while (s.offsets[e + 1] <= s.slot_of_token[i]) ++e;
      const index place = s.offsets[e] + s.offsets[e + 1] - 1 - s.slot_of_token[i];
      s.slot_of_token[i] = static_cast<std::int32_t>(place);
    }
    for (index e = 0; e < sizes_.experts; ++e) {
      const index first = s.offsets[e], last = s.offsets[e + 1];
      std::reverse(s.token_of_slot.data + first, s.token_of_slot.data + last);
      std::reverse(list.gates.data + first, list.gates.data + last);
    }
    return list;
  }

  template <class U>
  outcome<U> grouped(params<U>& p, const batch<U>& b, int threads = 1, bool reversed = false,
                     int repetitions = 1) {
    context<cpu> ctx(threads);
    const index tokens = b.x.rows();
    const slot_list<U> list = make_slots(ctx, b, reversed);
    const index slots = list.s.capacity();
    matrix<U, cpu> x(slots, sizes_.inputs), y(slots, sizes_.outputs), dy(slots, sizes_.outputs);
    matrix<U, cpu> dx(slots, sizes_.inputs);
    ops::gather(ctx, list.s, b.x.view(), x.view());
    ops::gather(ctx, list.s, b.dy.view(), dy.view());
    poison<U>(y.view());
    poison<U>(dx.view());
    vector<U, cpu> dgates(slots);
    const bool returned = subject_in<U>(expert_, in_double_)
                              .run_grouped(ctx, p, list.s, list.gates, x, y.view(), dy,
                                           dgates.view(), dx.view(), repetitions);
    returned_ = returned_ && returned;
    outcome<U> r{matrix<U, cpu>(tokens, sizes_.outputs), matrix<U, cpu>(tokens, sizes_.experts),
                 matrix<U, cpu>(tokens, sizes_.inputs), gradients_of<U>(p)};
    ops::combine(ctx, list.s, y.view(), r.y.view(), grad_mode::overwrite);
    ops::combine(ctx, list.s, dx.view(), r.dx.view(), grad_mode::overwrite);
    ops::build_segments_backward(ctx, b.mask.view(), list.s, dgates.view(), r.dgates.view(),
                                 grad_mode::overwrite);
    return r;
  }

  template <class U>
  outcome<U> masked(params<U>& p, const batch<U>& b, int threads = 1,
                    grad_mode dx_mode = grad_mode::overwrite,
                    U dx_before = std::numeric_limits<U>::quiet_NaN(), U y_before = U{0},
                    int repetitions = 1) {
    context<cpu> ctx(threads);
    const index tokens = b.x.rows();
    outcome<U> r{matrix<U, cpu>(tokens, sizes_.outputs),
                 matrix<U, cpu>(tokens, sizes_.experts),
                 matrix<U, cpu>(tokens, sizes_.inputs),
                 {}};
    std::fill_n(r.y.data(), r.y.size(), y_before);
    std::fill_n(r.dx.data(), r.dx.size(), dx_before);
    poison<U>(r.dgates.view());
    const bool returned = subject_in<U>(expert_, in_double_)
                              .run_masked(ctx, p, b.gates, b.x, r.y.view(), b.dy, r.dgates.view(),
                                          r.dx.view(), dx_mode, repetitions);
    returned_ = returned_ && returned;
    r.gradients = gradients_of<U>(p);
    return r;
  }

  /// dgates where the mask is on, zero elsewhere: what both forms know.
  template <class U>
  matrix<U, cpu> on_mask(const matrix<U, cpu>& dgates, const mask_matrix& mask) const {
    matrix<U, cpu> kept = dgates;
    for (index n = 0; n < kept.rows(); ++n) {
      for (index e = 0; e < kept.cols(); ++e) {
        if (!bit(mask.view(), n, e)) kept(n, e) = U{0};
      }
    }
    return kept;
  }

  /// The same batch and bank with absolute values, in double: the outcome bounds every sum of
  /// absolute terms.
  outcome<double> magnitudes(params<T>& p, const batch<T>& b, bool by_mask) {
    generator unused(1);
    params<double> wide =
        in_double_.init(sizes_.inputs, sizes_.outputs, sizes_.experts, unused, "");
    const auto from = parameters_of<T>(p);
    const auto to = parameters_of<double>(wide);
    for (std::size_t i = 0; i < from.size(); ++i) {
      for (index r = 0; r < from[i]->rows(); ++r) {
        for (index c = 0; c < from[i]->cols(); ++c) {
          to[i]->value()(r, c) = std::abs(static_cast<double>(from[i]->value()(r, c)));
        }
      }
    }
    const auto absolute = [](const matrix<T, cpu>& m) {
      matrix<double, cpu> a(m.rows(), m.cols());
      for (index i = 0; i < m.size(); ++i) {
        a.data()[i] = std::abs(static_cast<double>(m.data()[i]));
      }
      return a;
    };
    const batch<double> sizes{absolute(b.x), absolute(b.gates), b.mask, absolute(b.dy)};
    fill_gradients<double>(wide, 0.0);
    if (facts_.has_masked_form) {
      if (by_mask) return masked<double>(wide, sizes);
    }
    return grouped<double>(wide, sizes);
  }
  double roundings(index tokens) const {
    return claims_.amplification * static_cast<double>(sizes_.inputs + sizes_.outputs + tokens +
                                                       sizes_.experts * facts_.width + 8);
  }
  /// Two outcomes that differ by the order of their sums.
  void expect_close(law& l, const outcome<T>& found, const outcome<T>& expected,
                    const outcome<double>& sizes, const mask_matrix& mask, index tokens) {
    const double relative = 2.0 * gamma<T>(roundings(tokens));
    const auto compare = [&](const matrix<T, cpu>& a, const matrix<T, cpu>& b,
                             const matrix<double, cpu>& size, const std::string& name) {
      l.expect_none(first_excess(a.view(), b.view(),
                                 [&](index r, index c) { return relative * std::abs(size(r, c)); }),
                    name);
    };
    compare(found.y, expected.y, sizes.y, "y");
    compare(found.dx, expected.dx, sizes.dx, "dx");
    compare(on_mask(found.dgates, mask), on_mask(expected.dgates, mask), sizes.dgates, "dgates");
    for (std::size_t i = 0; i < expected.gradients.size(); ++i) {
      compare(found.gradients[i], expected.gradients[i], sizes.gradients[i],
              talpa::detail::concat("gradient of parameter ", std::to_string(i)));
    }
  }
  void expect_same(law& l, const outcome<T>& found, const outcome<T>& expected,
                   const std::string& where) {
    l.expect_none(testing::first_difference(found.y, expected.y), where + ", y");
    l.expect_none(testing::first_difference(found.dx, expected.dx), where + ", dx");
    l.expect_none(testing::first_difference(found.dgates, expected.dgates), where + ", dgates");
    l.expect_none(first_difference(found.gradients, expected.gradients), where);
  }

  void fresh() {
    if (!claims_.fresh_is_zero) return;
    law l(out_, "a fresh bank contributes exactly zero");
    params<T> p = expert_.init(sizes_.inputs, sizes_.outputs, sizes_.experts, random_, "");
    const batch<T> b = make_batch<T>(sizes_.tokens);
    l.expect(largest(grouped<T>(p, b).y.view()) == 0.0, [] { return std::string("grouped"); });
    if (facts_.has_masked_form) {
      const auto r = masked<T>(p, b, 1, grad_mode::overwrite, T{0}, T{0.125});
      for (index i = 0; i < r.y.size(); ++i) {
        l.expect(r.y.data()[i] == T{0.125}, [] { return std::string("masked"); });
      }
    }
  }

  void forms_agree() {
    if (facts_.has_masked_form) {
      law l(out_, "the masked form equals the grouped form within rounding");
      params<T> p = make_params<T>();
      const batch<T> b = make_batch<T>(sizes_.tokens);
      fill_gradients<T>(p, T{0});
      const outcome<T> by_slot = grouped<T>(p, b);
      fill_gradients<T>(p, T{0});
      const outcome<T> by_mask = masked<T>(p, b);
      expect_close(l, by_mask, by_slot, magnitudes(p, b, true), b.mask, sizes_.tokens);
    }
  }

  void order_of_slots() {
    law l(out_, "the order of an expert's slots does not matter but for rounding");
    params<T> p = make_params<T>();
    const batch<T> b = make_batch<T>(sizes_.tokens);
    fill_gradients<T>(p, T{0});
    const outcome<T> ascending = grouped<T>(p, b);
    fill_gradients<T>(p, T{0});
    const outcome<T> descending = grouped<T>(p, b, 1, true);
    expect_close(l, descending, ascending, magnitudes(p, b, false), b.mask, sizes_.tokens);
  }

  void experts_without_tokens() {
    if (sizes_.experts < 3) return;
    law l(out_, "an expert without tokens gets a gradient of zeros in the shape of its weights");
    params<T> p = make_params<T>();
    const batch<T> b = make_batch<T>(sizes_.tokens);
    const auto look = [&](const std::string& form) {
      for (const parameter<T, cpu>* q : parameters_of<T>(p)) {
        l.expect(q->grad().rows == q->rows() && q->grad().cols == q->cols(),
                 [&] { return talpa::detail::concat(form, ", shape of ", q->name()); });
        // Expert 1 has no token: see random_mask.
        const index rows = q->rows() / sizes_.experts;
        l.expect(q->rows() % sizes_.experts != 0 || largest(q->grad().row_range(rows, rows)) == 0.0,
                 [&] { return talpa::detail::concat(form, ", ", q->name()); });
      }
    };
    fill_gradients<T>(p, T{0});
    grouped<T>(p, b);
    look("grouped");
    if (facts_.has_masked_form) {
      fill_gradients<T>(p, T{0});
      masked<T>(p, b);
      look("masked");
    }
  }

  void some_experts_train() {
    if (facts_.trains_by_expert) {
      law l(out_, "trained experts get their part of the whole gradient, the others no storage");
      params<T> p = make_params<T>();
      const batch<T> b = make_batch<T>(sizes_.tokens);
      compare_parts(
          l, p, [&] { return grouped<T>(p, b); }, {}, "grouped");
      if (facts_.has_masked_form) {
        // All ranks are one product there, and a product of fewer rows may sum in another order.
        for (parameter<T, cpu>* q : parameters_of<T>(p)) q->train();
        const outcome<double> sizes = magnitudes(p, b, true);
        compare_parts(
            l, p, [&] { return masked<T>(p, b); }, sizes.gradients, "masked");
      }
    }
  }
  /// The gradients of some experts against their rows of the whole: same bits, or within rounding
  /// where the sums of absolute terms are given.
  template <class Compute>
  void compare_parts(law& l, params<T>& p, Compute compute,
                     const std::vector<matrix<double, cpu>>& sizes, const std::string& form) {
    std::vector<std::vector<index>> choices{{0}, {sizes_.experts - 1}, {}};
    if (sizes_.experts >= 4) choices.push_back({0, 2, 3});
    const double relative = 2.0 * gamma<T>(roundings(sizes_.tokens));
    for (parameter<T, cpu>* q : parameters_of<T>(p)) q->train();
    const outcome<T> whole = compute();
    for (const std::vector<index>& chosen : choices) {
      expert_.train_experts(p, std::span<const index>(chosen));
      const outcome<T> part = compute();
      l.expect_none(testing::first_difference(part.dx, whole.dx), form + ", dx");
      l.expect_none(testing::first_difference(part.dgates, whole.dgates), form + ", dgates");
      const auto parameters = parameters_of<T>(p);
      for (std::size_t i = 0; i < parameters.size(); ++i) {
        const parameter<T, cpu>& q = *parameters[i];
        const index rows = q.rows() / sizes_.experts;
        const auto count = static_cast<index>(chosen.size());
        const bool fits =
            q.trained_size() == count * rows * q.cols() && q.grad().rows == count * rows;
        const std::string where = talpa::detail::concat(form, ", ", q.name());
        l.expect(fits, [&] { return talpa::detail::concat(where, " has other storage"); });
        for (index c = 0; fits && c < count; ++c) {
          const index from = chosen[static_cast<std::size_t>(c)] * rows;
          const auto found = part.gradients[i].view().row_range(c * rows, rows);
          const auto expected = whole.gradients[i].view().row_range(from, rows);
          l.expect_none(sizes.empty()
                            ? testing::first_difference<T>(found, expected, c * rows)
                            : first_excess(found, expected,
                                           [&](index r, index d) {
                                             return relative * std::abs(sizes[i](from + r, d));
                                           }),
                        where);
        }
      }
    }
  }

  void frozen() {
    law l(out_, "a frozen bank has no gradient storage and passes the same gradients on");
    params<T> p = make_params<T>();
    const batch<T> b = make_batch<T>(sizes_.tokens);
    const auto compare = [&](auto compute, const std::string& form) {
      for (parameter<T, cpu>* q : parameters_of<T>(p)) q->train();
      const outcome<T> trained = compute();
      for (parameter<T, cpu>* q : parameters_of<T>(p)) q->freeze();
      const outcome<T> r = compute();
      l.expect_none(testing::first_difference(r.dx, trained.dx), form);
      l.expect_none(testing::first_difference(r.dgates, trained.dgates), form);
      for (const parameter<T, cpu>* q : parameters_of<T>(p)) {
        l.expect(q->grad().size() == 0, [&] { return q->name(); });
      }
    };
    compare([&] { return grouped<T>(p, b); }, "grouped");
    if (facts_.has_masked_form) compare([&] { return masked<T>(p, b); }, "masked");
  }

  void rule_of_signs() {
    law adds(out_, "backward adds to parameter gradients and keeps what forward saved");
    params<T> p = make_params<T>();
    batch<T> b = make_batch<T>(sizes_.tokens);
    batch<T> still = b;
    std::fill_n(still.dy.data(), still.dy.size(), T{0});
    fill_gradients<T>(p, T{0.375});
    const auto before = gradients_of<T>(p);
    adds.expect_none(first_difference(grouped<T>(p, still).gradients, before),
                     "grouped, no upstream gradient");
    const auto doubled = [&](outcome<T> once, const outcome<T>& twice, const std::string& form) {
      const outcome<double> sizes = magnitudes(p, b, form == "masked");
      adds.expect_none(testing::first_difference(twice.dx, once.dx), form + ", second call");
      adds.expect_none(testing::first_difference(twice.dgates, once.dgates),
                       form + ", second call");
      for (auto& g : once.gradients) {
        for (index i = 0; i < g.size(); ++i) g.data()[i] *= T{2};
      }
      for (std::size_t i = 0; i < once.gradients.size(); ++i) {
        const double relative = 4.0 * gamma<T>(roundings(sizes_.tokens));
        adds.expect_none(first_excess(twice.gradients[i].view(), once.gradients[i].view(),
                                      [&](index r, index c) {
                                        return relative * std::abs(sizes.gradients[i](r, c));
                                      }),
                         form + ", two calls");
      }
    };
    fill_gradients<T>(p, T{0});
    const outcome<T> slots_once = grouped<T>(p, b);
    fill_gradients<T>(p, T{0});
    doubled(slots_once, grouped<T>(p, b, 1, false, 2), "grouped");

    if (facts_.has_masked_form) {
      law modes(out_, "backward overwrites, adds to or leaves out dx as it is told");
      fill_gradients<T>(p, T{0.375});
      const outcome<T> r = masked<T>(p, still, 1, grad_mode::accumulate, T{0.375});
      adds.expect_none(first_difference(r.gradients, before), "masked, no upstream gradient");
      fill_gradients<T>(p, T{0});
      const outcome<T> once = masked<T>(p, b);
      fill_gradients<T>(p, T{0});
      const T nan = std::numeric_limits<T>::quiet_NaN();
      doubled(once, masked<T>(p, b, 1, grad_mode::overwrite, nan, T{0}, 2), "masked");
      const outcome<double> sizes = magnitudes(p, b, true);
      const outcome<T> added = masked<T>(p, b, 1, grad_mode::accumulate, T{2});
      const outcome<T> ignored = masked<T>(p, b, 1, grad_mode::ignore, T{7});
      for (index i = 0; i < once.dx.size(); ++i) {
        const double sum = static_cast<double>(once.dx.data()[i]) + 2.0;
        const double bound =
            gamma<T>(roundings(sizes_.tokens)) * (2.0 + 2.0 * std::abs(sizes.dx.data()[i]));
        modes.expect(r.dx.data()[i] == T{0.375},
                     [] { return std::string("adding zero changes dx"); });
        modes.expect(std::abs(static_cast<double>(added.dx.data()[i]) - sum) <= bound,
                     [] { return std::string("adding to dx gives another sum"); });
        modes.expect(ignored.dx.data()[i] == T{7},
                     [] { return std::string("ignored dx is written"); });
      }
      modes.expect_none(testing::first_difference(ignored.dgates, once.dgates), "dgates");
    }
    law memory(out_, "backward hands its memory back");
    memory.expect(returned_, [] { return std::string("it keeps some"); });
  }

  void same_bits() {
    law l(out_, "any number of threads and any repetition gives the same bits");
    // Enough tokens for a product to be cut into tasks.
    const batch<T> b = make_batch<T>(1100);
    params<T> p = make_params<T>();
    const auto compare = [&](auto compute, const std::string& form) {
      fill_gradients<T>(p, T{0});
      const outcome<T> one = compute(1);
      for (const int threads : {1, 2, 3}) {
        fill_gradients<T>(p, T{0});
        expect_same(l, compute(threads), one,
                    talpa::detail::concat(form, " on ", std::to_string(threads), " threads"));
      }
    };
    compare([&](int threads) { return grouped<T>(p, b, threads); }, "grouped");
    if (facts_.has_masked_form) {
      compare([&](int threads) { return masked<T>(p, b, threads); }, "masked");
    }
  }

  void no_tokens() {
    law l(out_, "a batch of no tokens is legal and leaves gradients as they were");
    params<T> p = make_params<T>();
    fill_gradients<T>(p, T{0.25});
    const auto before = gradients_of<T>(p);
    const batch<T> b = make_batch<T>(0);
    l.expect_none(first_difference(grouped<T>(p, b).gradients, before), "grouped");
    if (facts_.has_masked_form) {
      l.expect_none(first_difference(masked<T>(p, b).gradients, before), "masked");
    }
  }

  /// Accuracy of outputs [rows, O]: absolute values of everything, with upstream gradients of one.
  gradient_accuracy accuracy(params<double>& p, const batch<double>& b, double terms) const {
    const double x = std::max(1.0, largest(b.x.view())),
                 w = std::max(1.0, largest_weight<double>(p));
    const double g = std::max(1.0, largest(b.gates.view()));
    const double inner = static_cast<double>(sizes_.inputs * std::max<index>(1, facts_.width));
    return {.roundings = roundings(sizes_.tokens), .magnitude = terms * g * inner * x * w * w};
  }

  void grouped_gradients() {
    params<double> p = make_params<double>();
    const batch<double> b = make_batch<double>(sizes_.tokens);
    context<cpu> ctx(1);
    const slot_list<double> list = make_slots(ctx, b, false);
    const index slots = list.s.capacity();
    matrix<double, cpu> x(slots, sizes_.inputs), y(slots, sizes_.outputs), dx(slots, sizes_.inputs);
    matrix<double, cpu> dgates(slots, 1);
    ops::gather(ctx, list.s, b.x.view(), x.view());
    const matrix<double, cpu> upstream = cotangent(slots, sizes_.outputs, 4);
    fill_gradients<double>(p, 0.0);
    const auto run = [&](int repetitions) {
      in_double_.run_grouped(ctx, p, list.s, list.gates, x, y.view(), upstream,
                             vector_view<double, cpu>(dgates.data(), slots), dx.view(),
                             repetitions);
    };
    run(1);
    std::vector<gradient_probe> probes{
        {"x", x.view(), dx.view()},
        {"gates", matrix_view<double, cpu>(list.gates.data, slots, 1), dgates.view()}};
    add_probes(p, probes);
    out_.add(gradient_check(
        "grouped", probes, upstream, accuracy(p, b, static_cast<double>(y.size())),
        [&] {
          const workspace<cpu>::scope scope(ctx.memory);
          run(0);
          return y.view();
        },
        [] { return 0; }));
  }

  void masked_gradients() {
    params<double> p = make_params<double>();
    batch<double> b = make_batch<double>(sizes_.tokens);
    const matrix<double, cpu> upstream = cotangent(sizes_.tokens, sizes_.outputs, 4);
    context<cpu> ctx(1);
    matrix<double, cpu> y(sizes_.tokens, sizes_.outputs), dx(sizes_.tokens, sizes_.inputs);
    matrix<double, cpu> dgates(sizes_.tokens, sizes_.experts);
    fill_gradients<double>(p, 0.0);
    const auto run = [&](int repetitions) {
      std::fill_n(y.data(), y.size(), 0.0);
      in_double_.run_masked(ctx, p, b.gates, b.x, y.view(), upstream, dgates.view(), dx.view(),
                            grad_mode::overwrite, repetitions);
    };
    run(1);
    std::vector<gradient_probe> probes{{"x", b.x.view(), dx.view()},
                                       {"gates", b.gates.view(), dgates.view()}};
    add_probes(p, probes);
    out_.add(gradient_check(
        "masked", probes, upstream, accuracy(p, b, static_cast<double>(y.size() * sizes_.experts)),
        [&] {
          const workspace<cpu>::scope scope(ctx.memory);
          run(0);
          return y.view();
        },
        [] { return 0; }));
  }

  const expert_subject<T>& expert_;
  const expert_subject<double>& in_double_;
  expert_facts facts_;
  expert_claims claims_;
  expert_sizes sizes_;
  generator random_;
  bool returned_ = true;
  report out_;
};

}  // namespace detail

/// Laws of an expert in scalar T, on the CPU.
///
/// Initialisation depends on the generator alone, and a fresh bank contributes zero where claimed;
/// the masked form, where there is one, equals the grouped form within rounding, and the order of
/// slots does not matter; experts without tokens get zero gradients of the right shape; trained
/// experts get their part of the whole gradient (the same bits in the grouped form, within rounding
/// in the masked one), frozen ones have no storage; backward obeys the rule of signs; any number of
/// threads gives the same bits; gradients of x, gates and every parameter equal central differences
/// in double.
template <floating T, class Expert>
report expert_laws(const Expert& expert, const expert_claims& claims = {},
                   const expert_sizes& sizes = {}, std::uint64_t seed = 1) {
  static_assert(talpa::detail::explain_expert<Expert>());
  expert.validate();
  const detail::expert_model<T, Expert> subject(expert);
  const detail::expert_model<double, Expert> in_double(expert);
  const detail::expert_facts facts{.has_masked_form = rank_space_expert<Expert>,
                                   .trains_by_expert = detail::trains_by_expert<Expert, T>,
                                   .width = expert.width()};
  return detail::expert_trial<T>(subject, in_double, facts, claims, sizes, seed).run();
}

}  // namespace talpa::testing
