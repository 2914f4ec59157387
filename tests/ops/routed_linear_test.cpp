// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/routed_linear.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/inputs.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>

namespace talpa::routed_linear_test {

using namespace support;

namespace {

struct sizes {
  index tokens, inputs, outputs, experts, ranks;
};

/// Everything the ops read and write.
template <class T>
struct arguments {
  sizes s;
  index most;
  padded<T> x, dy, router, a, b, router_bias, bias, dlogits_of_losses, dgates_of_losses;
  context<cpu> ctx;
  packed_matrix<T, cpu> forward, backward;  // W^T, W
  vector<std::uint8_t, cpu> padding;
  bool biased = false;  // whether router and base have a bias
  matrix<T, cpu> logits, gates;
  matrix<std::uint32_t, cpu> mask;
  matrix<T, cpu> u;  // [N K, R]
  padded<T> y;
  dropout_mask dropped{};
  matrix<std::uint32_t, cpu> kept;  // words of the mask

  arguments(const sizes& s_, index most_, test_random& random, int threads = 1,
            weight_storage storage = weight_storage::exact)
      : s(s_),
        most(most_),
        x(random_matrix<T>(random, s.tokens, s.inputs)),
        dy(random_matrix<T>(random, s.tokens, s.outputs)),
        router(random_matrix<T>(random, s.experts, s.inputs)),
        a(random_matrix<T>(random, s.experts * s.ranks, s.inputs)),
        b(random_matrix<T>(random, s.experts * s.ranks, s.outputs)),
        router_bias(random_matrix<T>(random, 1, s.experts)),
        bias(random_matrix<T>(random, 1, s.outputs)),
        dlogits_of_losses(random_matrix<T>(random, s.tokens, s.experts)),
        dgates_of_losses(random_matrix<T>(random, s.tokens, s.experts)),
        ctx(threads),
        logits(s.tokens, s.experts),
        gates(s.tokens, s.experts),
        mask(s.tokens, mask_words(s.experts)),
        u(s.tokens * most, s.ranks),
        y(s.tokens, s.outputs) {
    const matrix<T, cpu> w = random_matrix<T>(random, s.outputs, s.inputs);
    forward = packed_matrix<T, cpu>(ctx, w, transpose::yes, storage);
    backward = packed_matrix<T, cpu>(ctx, w, transpose::no, storage);
  }
  routed_adapter<T, cpu> adapter() {
    routed_adapter<T, cpu> made{router.view(), a.view(), b.view(), static_cast<T>(0.75), most};
    if (biased) made.router_bias = router_bias.view();
    return made;
  }
  packed_product<T, cpu> base() {
    packed_product<T, cpu> made{x.view(), &forward};
    if (biased) made.bias = bias.view();
    return made;
  }
  routed_choice<T, cpu> choice() { return {logits.view(), gates.view(), mask.view()}; }
  /// Drops a share of x from now on.
  void drop(float share) {
    dropped = {{31, 5}, 1.0f - share, true};
    kept = matrix<std::uint32_t, cpu>(s.tokens, mask_words(s.inputs));
  }
  dropout_bits<cpu> bits() { return {kept.view(), dropped.keep}; }
};

/// What backward leaves, and the slots it went by.
template <class T>
struct gradients {
  segments<cpu> slots;
  matrix<T, cpu> u, dgates, dlogits, du;
  padded<T> dx;

  gradients(arguments<T>& in, const matrix<T, cpu>& dx_before)
      : dgates(in.s.tokens, in.s.experts), dlogits(in.s.tokens, in.s.experts), dx(dx_before) {
    const index count = ops::count_slots(in.ctx, in.mask, in.s.experts);
    slots = make_segments(in.ctx.memory, in.s.tokens, in.s.experts, count);
    gates = in.ctx.memory.template take<T>(count);
    ops::build_segments(in.ctx, in.mask, in.gates, slots, gates);
    u = du = matrix<T, cpu>(count, in.s.ranks);
  }
  vector_view<T, cpu> gates;  // [S]
};

/// forward by the ops that routed_linear stands for.
template <class T, class Selector>
void forward_apart(arguments<T>& in, const Selector& selector, gradients<T>* slots_of = nullptr) {
  ops::gemm(in.ctx, in.x.view(), transpose::no, in.router.view(), transpose::yes, T{0},
            in.logits.view());
  if (in.biased) {
    ops::add_bias(in.ctx, in.logits.view(), in.router_bias.view(), in.logits.view());
  }
  ops::select(in.ctx, selector, in.logits, in.padding.view(), in.gates.view(), in.mask.view());
  gradients<T> slots(in, matrix<T, cpu>(0, 0));
  matrix<T, cpu> x(in.s.tokens, in.s.inputs);
  ops::copy(in.ctx, in.x.view(), x.view());
  if (in.dropped.active) {
    ops::draw_dropout(in.ctx, in.dropped.stream, in.s.inputs, in.bits());
    ops::apply_dropout(in.ctx, in.bits(), in.x.view(), x.view(), grad_mode::overwrite);
  }
  ops::indexed_shrink(in.ctx, slots.slots, x, in.a.view(), slots.u.view());
  matrix<T, cpu> z(slots.u.rows(), slots.u.cols());
  ops::rank_gate(in.ctx, in.adapter().scale, as_column(slots.gates), slots.u, z.view());
  ops::gemm(in.ctx, in.x.view(), transpose::no, in.forward, T{0}, in.y.view());
  if (in.biased) ops::add_bias(in.ctx, in.y.view(), in.bias.view(), in.y.view());
  ops::indexed_expand(in.ctx, slots.slots, z, in.b.view(), in.y.view(), grad_mode::accumulate);
  if (slots_of != nullptr) *slots_of = std::move(slots);
}
template <class T, class Selector>
void forward_joined(arguments<T>& in, const Selector& selector) {
  ops::routed_linear(in.ctx, selector, in.adapter(), in.base(), in.padding.view(), in.choice(),
                     in.u.view(), in.y.view(), {in.dropped, in.kept.view()});
}

/// backward by the ops that routed_linear_backward stands for.
template <class T, class Selector>
void backward_apart(arguments<T>& in, const Selector& selector, gradients<T>& out, bool losses,
                    grad_mode dx_mode) {
  context<cpu>& ctx = in.ctx;
  vector<T, cpu> dgate_of_slot(out.slots.capacity());
  ops::indexed_shrink(ctx, out.slots, in.dy.view(), in.b.view(), out.du.view());
  ops::rank_gate_backward(ctx, in.adapter().scale, as_column(out.gates), out.u, out.du,
                          out.du.view(), as_column(dgate_of_slot.view()));
  ops::build_segments_backward(ctx, in.mask, out.slots, dgate_of_slot.view(), out.dgates.view(),
                               grad_mode::overwrite);
  const auto add = [&](matrix_view<T, cpu> more, matrix<T, cpu>& to) {
    for (index n = 0; losses && n < to.rows(); ++n) {
      for (index e = 0; e < to.cols(); ++e) to(n, e) += more(n, e);
    }
  };
  add(in.dgates_of_losses.view(), out.dgates);
  ops::select_backward(ctx, selector, in.logits, in.gates, in.mask, out.dgates, out.dlogits.view());
  add(in.dlogits_of_losses.view(), out.dlogits);
  ops::indexed_expand(ctx, out.slots, out.du, in.a.view(), {in.dy.view(), &in.backward},
                      out.dx.view(), dx_mode, {out.dlogits.view(), in.router.view()}, in.bits());
}
template <class T, class Selector>
void backward_joined(arguments<T>& in, const Selector& selector, gradients<T>& out, bool losses,
                     grad_mode dx_mode) {
  const matrix_view<const T, cpu> none;
  ops::routed_linear_backward(in.ctx, selector, in.adapter(), {in.dy.view(), &in.backward},
                              {in.logits.view(), in.gates.view(), in.mask.view()},
                              {out.slots, out.gates, out.u.view(), in.bits()},
                              losses ? in.dlogits_of_losses.view() : none,
                              losses ? in.dgates_of_losses.view() : none, out.dgates.view(),
                              out.dlogits.view(), out.du.view(), out.dx.view(), dx_mode);
}

/// What a comparison has beside sizes and a selector.
struct options {
  bool pads = false, biased = false;
  weight_storage storage = weight_storage::exact;
  float dropped = 0.0f;
};

/// Both ways on equal arguments, forward and backward: no bit may differ.
template <class T, class Selector>
void compare(const sizes& s, const Selector& selector, const options& with = {}) {
  CAPTURE(with.dropped);
  CAPTURE(with.biased);
  CAPTURE(s.tokens);
  CAPTURE(s.inputs);
  CAPTURE(s.experts);
  const index most = selector.max_selected(s.experts);
  for (const int threads : {1, 2, 3}) {
    test_random random(71), same(71);
    arguments<T> apart(s, most, random, 1, with.storage);
    arguments<T> joined(s, most, same, threads, with.storage);
    for (index n = 0; with.pads && n < s.tokens; ++n) {
      if (n == 0) apart.padding = joined.padding = vector<std::uint8_t, cpu>(s.tokens);
      apart.padding[n] = joined.padding[n] = n % 5 != 2 ? 1 : 0;
    }
    for (arguments<T>* const both : {&apart, &joined}) {
      both->biased = with.biased;
      if (with.dropped > 0.0f) both->drop(with.dropped);
    }
    gradients<T> one(apart, matrix<T, cpu>(0, 0));
    forward_apart(apart, selector, &one);
    testing::poison<T>(joined.y.view());
    forward_joined(joined, selector);
    CHECK(testing::first_difference(joined.logits, apart.logits) == "");
    CHECK(testing::first_difference(joined.gates, apart.gates) == "");
    CHECK(
        std::equal(joined.mask.data(), joined.mask.data() + joined.mask.size(), apart.mask.data()));
    CHECK(
        std::equal(joined.kept.data(), joined.kept.data() + joined.kept.size(), apart.kept.data()));
    CHECK(testing::first_difference<T>(joined.y.view(), apart.y.view()) == "");
    CHECK(joined.y.intact());

    const matrix<T, cpu> before = random_matrix<T>(random, s.tokens, s.inputs);
    gradients<T> other(joined, before);
    ops::rows_of_slots(joined.ctx, other.slots, most, joined.u, other.u.view());
    CHECK(testing::first_difference(other.u, one.u) == "");
    for (const bool losses : {false, true}) {
      for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
        one.dx = padded<T>(before);
        other.dx = padded<T>(before);
        backward_apart(apart, selector, one, losses, mode);
        testing::poison<T>(other.dgates.view());
        testing::poison<T>(other.dlogits.view());
        testing::poison<T>(other.du.view());
        backward_joined(joined, selector, other, losses, mode);
        CHECK(testing::first_difference(other.dgates, one.dgates) == "");
        CHECK(testing::first_difference(other.dlogits, one.dlogits) == "");
        CHECK(testing::first_difference(other.du, one.du) == "");
        CHECK(testing::first_difference<T>(other.dx.view(), one.dx.view()) == "");
        CHECK(other.dx.intact());
      }
    }
    CHECK(joined.ctx.scratch.used() == 0);
  }
}

}  // namespace

TEST_SUITE("ops/routed_linear") {
  TEST_CASE("two experts of rank 1 on equal features, by hand") {
    // 64 inputs, of which the first two are not zero; W = 0 but for one element.
    test_random random(70);
    arguments<float> in({8, 64, 2, 2, 1}, 1, random);
    const auto clear = [](matrix_view<float, cpu> m) {
      for (index i = 0; i < m.rows; ++i) std::fill_n(m.row(i), m.cols, 0.0f);
    };
    for (const auto& m : {in.x.view(), in.dy.view(), in.router.view(), in.a.view(), in.b.view()}) {
      clear(m);
    }
    matrix<float, cpu> w(2, 64);
    w(1, 0) = 10.0f;
    in.forward = packed_matrix<float, cpu>(in.ctx, w, transpose::yes);
    in.backward = packed_matrix<float, cpu>(in.ctx, w, transpose::no);
    in.router.view()(0, 0) = 1.0f;  // expert 0 looks at the first feature, expert 1 at the second
    in.router.view()(1, 1) = 1.0f;
    in.a.view()(0, 0) = 2.0f;
    in.a.view()(1, 1) = 4.0f;
    in.b.view()(0, 0) = 3.0f;
    in.b.view()(1, 1) = 5.0f;
    in.x.view()(0, 0) = 1.0f;  // token 0 goes to expert 0
    in.x.view()(1, 1) = 2.0f;  // token 1 to expert 1, the others, all equal, to expert 0
    forward_joined(in, top_k<gate::renormalised>{.k = 1});
    // s g B A x = 0.75 * 1 * 3 * 2 and, for W, 10; 0.75 * 5 * 4 * 2.
    CHECK(in.y.view()(0, 0) == 4.5f);
    CHECK(in.y.view()(0, 1) == 10.0f);
    CHECK(in.y.view()(1, 0) == 0.0f);
    CHECK(in.y.view()(1, 1) == 30.0f);
    CHECK(in.y.view()(7, 0) == 0.0f);
    CHECK(in.mask(1, 0) == 2u);
    CHECK(in.mask(7, 0) == 1u);
    CHECK(in.u(0, 0) == 2.0f);
    CHECK(in.u(1, 0) == 8.0f);

    in.dy.view()(0, 0) = 1.0f;
    in.dy.view()(1, 1) = 1.0f;
    gradients<float> out(in, matrix<float, cpu>(8, 64));
    ops::rows_of_slots(in.ctx, out.slots, 1, in.u, out.u.view());
    backward_joined(in, top_k<gate::renormalised>{.k = 1}, out, false, grad_mode::overwrite);
    CHECK(out.dgates(0, 0) == 4.5f);
    CHECK(out.dgates(1, 1) == 30.0f);
    CHECK(out.dgates(1, 0) == 0.0f);
    CHECK(out.dlogits(0, 0) == 0.0f);  // a gate of 1 whatever the logit
    // dx = dy W + s g dy B A.
    CHECK(out.dx.view()(0, 0) == 4.5f);
    CHECK(out.dx.view()(1, 0) == 10.0f);
    CHECK(out.dx.view()(1, 1) == 15.0f);
  }

  TEST_CASE_TEMPLATE("it has the bits of the ops that it stands for", T, TALPA_SCALARS) {
    const index deep = detail::tile_depth<T> + 5, wide = 3 * detail::register_tile<T>::cols + 3;
    const index many = many_rows(300);
    // More rows than are routed together, in a task of fewer.
    const index block = detail::indexed_block_bytes / static_cast<index>(sizeof(T)) / 60;
    for (const sizes& s : {sizes{8, 64, 5, 2, 1}, sizes{129, 70, 40, 8, 3},
                           sizes{many, deep, wide, 16, 5}, sizes{130, block, 20, 3, 2}}) {
      compare<T>(s, top_k<gate::renormalised>{.k = 2}, {.biased = true});
      compare<T>(s, top_k<gate::raw>{.k = 1}, {.pads = true});
    }
    compare<T>({90, 66, 33, 5, 4}, dynamic_entropy{}, {.pads = true});
    compare<T>({90, 66, 33, 5, 4}, dynamic_entropy{}, {.pads = true, .biased = true});
  }

  TEST_CASE("a rounded weight has the bits of the ops, too") {
    compare<float>({129, 71, 40, 8, 3}, top_k<gate::renormalised>{.k = 2},
                   {.biased = true, .storage = weight_storage::bfloat16});
  }

  TEST_CASE_TEMPLATE("with dropout too, whatever the width and however few rows go together", T,
                     TALPA_SCALARS) {
    // Half the bytes of a block are for what dropout leaves.
    const index block = detail::indexed_block_bytes / static_cast<index>(sizeof(T)) / 60;
    const index wide = 3 * detail::indexed_tile<T>::sum_cols;
    for (const sizes& s : {sizes{129, 71, 40, 8, 3}, sizes{many_rows(300), wide, 33, 16, 5},
                           sizes{130, block, 20, 3, 2}}) {
      compare<T>(s, top_k<gate::renormalised>{.k = 2},
                 {.pads = true, .biased = true, .dropped = 0.3f});
    }
  }

  TEST_CASE("sizes for which one op after the other is the better way") {
    test_random random(72);
    arguments<float> in({64, 64, 16, 4, 2}, 2, random);
    const auto pays = [&](const context<cpu>& ctx, index tokens, index experts) {
      return ops::routed_linear_pays<cpu, float>(ctx, in.forward, tokens, experts);
    };
    CHECK(pays(in.ctx, 64, 4));
    CHECK_FALSE(pays(in.ctx, 64, detail::skinny_most + 1));
    CHECK_FALSE(pays(in.ctx, 64, 1));
    CHECK_FALSE(pays(in.ctx, detail::inner_rows - 1, 4));
    context<cpu> looks(1);
    looks.checked = true;
    CHECK_FALSE(pays(looks, 64, 4));
    // Whatever the number of threads, so that it changes no bit.
    CHECK(pays(context<cpu>(8), 64, 4));
  }

  TEST_CASE("a second call takes no memory") {
    test_random random(73);
    arguments<float> in({150, 70, 40, 5, 3}, 2, random, 2);
    const top_k<gate::renormalised> selector{.k = 2};
    forward_joined(in, selector);
    gradients<float> out(in, matrix<float, cpu>(150, 70));
    const auto all = [&] {
      forward_joined(in, selector);
      ops::rows_of_slots(in.ctx, out.slots, 2, in.u, out.u.view());
      backward_joined(in, selector, out, true, grad_mode::accumulate);
    };
    all();
    const index allocations = in.ctx.scratch.allocations();
    all();
    CHECK(in.ctx.scratch.allocations() == allocations);
  }

  TEST_CASE("arguments that do not fit are refused, and y stays as it was") {
    test_random random(74);
    arguments<float> in({8, 64, 16, 4, 2}, 2, random);
    const top_k<gate::renormalised> selector{.k = 2};
    matrix<float, cpu> y(8, 16);
    y(7, 15) = 7.0f;
    const auto run = [&](const auto& change) {
      auto adapter = in.adapter();
      auto choice = in.choice();
      packed_product<float, cpu> base = in.base();
      matrix_view<float, cpu> u = in.u.view(), out = y.view();
      change(adapter, choice, base, u, out);
      ops::routed_linear(in.ctx, selector, adapter, base, in.padding.view(), choice, u, out);
    };
#define REFUSES(change, text)                                                                 \
  CHECK_THROWS_WITH_AS(run([&]([[maybe_unused]] auto& adapter, [[maybe_unused]] auto& choice, \
                               [[maybe_unused]] auto& base, [[maybe_unused]] auto& u,         \
                               [[maybe_unused]] auto& out) { change; }),                      \
                       "talpa::ops::routed_linear: " text, shape_error)
    REFUSES(adapter.a = adapter.a.row_range(0, 7),
            "'a' has shape [7, 64], expected [multiple of 4, ...] = ranks of all experts");
    REFUSES(adapter.b = adapter.b.row_range(0, 7),
            "'b' has shape [7, 16], expected [8, 16] = rows of a");
    REFUSES(adapter.router = adapter.router.col_range(0, 63),
            "'router' has shape [4, 63], expected [4, 64] = experts, columns of a");
    REFUSES(choice.logits = choice.logits.row_range(0, 7),
            "'logits' has shape [7, 4], expected [8, 4] = tokens, rows of the router");
    REFUSES(choice.gates = choice.gates.row_range(0, 7),
            "'gates' has shape [7, 4], expected [8, 4] = shape of logits");
    REFUSES(choice.mask = choice.mask.row_range(0, 7),
            "'mask' has shape [7, 1], expected [8, 1] = tokens, mask words of the experts");
    REFUSES(base.a = base.a.col_range(0, 63),
            "'x' has shape [8, 63], expected [8, 64] = rows of the product");
    REFUSES(base.b = &in.backward;
            base.a = in.dy.view(),
            "'base' has shape [16, 64], expected [64, 16] = columns of the bank's factors");
    REFUSES(base.bias = in.bias.view().col_range(0, 15),
            "'bias' has shape [1, 15], expected [1, 16] = one row, columns of b");
    REFUSES(adapter.router_bias = in.router_bias.view().col_range(0, 3),
            "'router_bias' has shape [1, 3], expected [1, 4] = one row, rows of the router");
    REFUSES(u = u.row_range(0, 15),
            "'u' has shape [15, 2], expected [16, 2] = max_selected places a token, ranks of an "
            "expert");
    REFUSES(out = out.row_range(0, 7),
            "'y' has shape [7, 16], expected [8, 16] = tokens, columns of b");
#undef REFUSES
    CHECK_THROWS_WITH_AS(run([](auto& adapter, auto&, auto&, auto&, auto&) {
                           adapter.router = adapter.router.row_range(0, 0);
                         }),
                         "talpa::ops::routed_linear: 'experts' is 0, expected >= 1 = at least one "
                         "row of the router",
                         value_error);
    CHECK_THROWS_WITH_AS(
        run([](auto& adapter, auto&, auto&, auto&, auto&) { adapter.max_selected = 5; }),
        "talpa::ops::routed_linear: 'max_selected' is 5, expected 1..4 = experts of a token",
        value_error);
    matrix<std::uint32_t, cpu> words(8, 3);
    const auto drop = [&](index columns, float keep_probability) {
      ops::routed_linear(in.ctx, selector, in.adapter(), {in.x.view(), &in.forward},
                         in.padding.view(), in.choice(), in.u.view(), y.view(),
                         {{{1, 2}, keep_probability, true}, words.view().col_range(0, columns)});
    };
    CHECK_THROWS_WITH_AS(drop(3, 0.5f),
                         "talpa::ops::routed_linear: 'words' has shape [8, 3], expected [8, 2] = "
                         "rows, words of the columns",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        drop(2, 0.0f),
        "talpa::ops::routed_linear: 'keep_probability' is 0, expected a number in (0, 1]",
        value_error);
    CHECK(y(7, 15) == 7.0f);
  }

  TEST_CASE("arguments of backward that do not fit are refused, and dx stays as it was") {
    test_random random(75);
    arguments<float> in({8, 64, 16, 4, 2}, 2, random);
    const top_k<gate::renormalised> selector{.k = 2};
    forward_joined(in, selector);
    gradients<float> out(in, matrix<float, cpu>(8, 64));
    out.dx.view()(7, 63) = 7.0f;
    struct views {
      packed_product<float, cpu> base;
      ops::routed_slots<float, cpu> kept;
      matrix_view<const float, cpu> dlogits_of_losses, dgates_of_losses;
      matrix_view<float, cpu> dgates, dlogits, du, dx;
    };
    const auto run = [&](const auto& change) {
      views v{{in.dy.view(), &in.backward},
              {out.slots, out.gates, out.u.view()},
              in.dlogits_of_losses.view(),
              in.dgates_of_losses.view(),
              out.dgates.view(),
              out.dlogits.view(),
              out.du.view(),
              out.dx.view()};
      change(v);
      ops::routed_linear_backward(in.ctx, selector, in.adapter(), v.base,
                                  {in.logits.view(), in.gates.view(), in.mask.view()}, v.kept,
                                  v.dlogits_of_losses, v.dgates_of_losses, v.dgates, v.dlogits,
                                  v.du, v.dx, grad_mode::overwrite);
    };
#define REFUSES(change, text)                          \
  CHECK_THROWS_WITH_AS(run([&](views& v) { change; }), \
                       "talpa::ops::routed_linear_backward: " text, shape_error)
    REFUSES(v.base.a = v.base.a.col_range(0, 15),
            "'dy' has shape [8, 15], expected [8, 16] = rows of the product");
    REFUSES(v.base.b = &in.forward;
            v.base.a = in.x.view(),
            "'base' has shape [64, 16], expected [16, 64] = columns of the bank's factors");
    REFUSES(v.kept.u = v.kept.u.row_range(0, 15),
            "'u' has shape [15, 2], expected [16, 2] = places for slots, ranks of an expert");
    REFUSES(v.kept.gates.size = 15, "'gates' has shape [15], expected [16] = places for slots");
    REFUSES(v.du = v.du.row_range(0, 15), "'du' has shape [15, 2], expected [16, 2] = shape of u");
    REFUSES(v.dgates = v.dgates.row_range(0, 7),
            "'dgates' has shape [7, 4], expected [8, 4] = shape of logits");
    REFUSES(v.dlogits = v.dlogits.row_range(0, 7),
            "'dlogits' has shape [7, 4], expected [8, 4] = shape of logits");
    REFUSES(v.dx = v.dx.row_range(0, 7),
            "'dx' has shape [7, 64], expected [8, 64] = tokens, columns of a");
    matrix<std::uint32_t, cpu> words(8, 3);
    REFUSES(v.kept.dropout = (dropout_bits<cpu>{words.view(), 0.5f}),
            "'words' has shape [8, 3], expected [8, 2] = rows, words of the columns");
    REFUSES(v.dlogits_of_losses = v.dlogits_of_losses.row_range(0, 7),
            "'dlogits of losses' has shape [7, 4], expected [8, 4] = shape of logits");
    REFUSES(v.dgates_of_losses = v.dgates_of_losses.row_range(0, 7),
            "'dgates of losses' has shape [7, 4], expected [8, 4] = shape of logits");
#undef REFUSES
    CHECK(out.dx.view()(7, 63) == 7.0f);
    matrix<float, cpu> rows(16, 2);
    CHECK_THROWS_WITH_AS(
        ops::rows_of_slots(in.ctx, out.slots, 1, in.u, rows.view()),
        "talpa::ops::rows_of_slots: 'u' has shape [16, 2], expected [8, 2] = places of the tokens",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::rows_of_slots(in.ctx, out.slots, 2, in.u, matrix<float, cpu>(15, 2).view()),
        "talpa::ops::rows_of_slots: 'out' has shape [15, 2], expected [16, 2] = places for slots, "
        "columns of u",
        shape_error);
  }
}

}  // namespace talpa::routed_linear_test
