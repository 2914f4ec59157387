// SPDX-License-Identifier: Apache-2.0
// device_bench [FILE]: what a device does today, the fused MoLE layer beside its frozen linear map,
// and routing beside the copy rate. Prints a Markdown table and writes FILE as JSON; with
// --ceilings in its place what the device does today alone.
#include "timing.cuh"
#include "work.cuh"

#include <talpa/core/half.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/convert.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/gemm.cuh>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/mole_route.hpp>
#include <talpa/cuda/pair_gates.hpp>
#include <talpa/cuda/rank_gate.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/route.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/slot_glu.hpp>
#include <talpa/layers/fused_moe_ffn.hpp>
#include <talpa/layers/fused_mole_linear.hpp>
#include <talpa/layers/fused_perft_block.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/top_k.hpp>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace talpa::bench {
namespace {

using renormalised = top_k<gate::renormalised>;

struct ceilings {
  double copy_bytes_per_us;  // read and written
  double flop_per_us;        // bfloat16 products
};

ceilings measure_ceilings(context<gpu>& ctx, report& out) {
  const double copy = copy_microseconds(ctx);
  const index k = 8192;
  const auto x = normal_matrix<bfloat16>(ctx, k, k, 1.0f, 1);
  const auto w = normal_matrix<bfloat16>(ctx, k, k, 1.0f, 2);
  matrix<bfloat16, gpu> y(k, k);
  const double product = microseconds(ctx, [&] {
    ops::mixed_gemm(ctx, 1.0f, x.view(), transpose::no, w.view(), transpose::yes, 0.0f, y.view());
  });
  const ceilings c{copied_bytes / copy, 2.0 * std::pow(8192.0, 3) / product};
  out.line("copy of 1 GiB", copy, "TB/s read and written", c.copy_bytes_per_us * 1e-6);
  out.line("bf16 product 8192^3", product, "TFLOP/s", c.flop_per_us * 1e-6);
  return c;
}

/// The layer and its base at one size.
template <class Selector>
void layer_lines(context<gpu>& ctx, report& out, const std::string& label, const Selector& selector,
                 index tokens, index width, index experts, index rank) {
  using S = bfloat16;
  fused_mole_linear<Selector, S> layer{selector, lora{.rank = rank, .alpha = 16.0}, experts};
  generator random(1);
  const auto base = normal_matrix<S>(ctx, width, width, 1.0f / std::sqrt(float(width)), 3);
  auto p = layer.init(ctx, base.view(), random);
  const auto b = normal_matrix<float>(ctx, experts * rank, width, 0.02f, 4);
  ops::convert(ctx, b.view(), p.b.value());
  const auto wr = normal_matrix<float>(ctx, experts, width, 1.0f / std::sqrt(float(width)), 5);
  ops::convert(ctx, wr.view(), p.router.value());
  layer.refresh(ctx, p);
  auto x = normal_matrix<S>(ctx, tokens, layer.padded_inputs(width), 1.0f, 6);
  auto dy = normal_matrix<S>(ctx, tokens, layer.padded_outputs(width), 1.0f, 7);
  matrix<S, gpu> y(tokens, width), dx(tokens, width);
  matrix<S, gpu> x_close(tokens, width), dy_close(tokens, width);
  ops::convert(ctx, std::as_const(x).view().col_range(0, width), x_close.view());
  ops::convert(ctx, std::as_const(dy).view().col_range(0, width), dy_close.view());
  const std::string at = label + " N:" + std::to_string(tokens) + " D:" + std::to_string(width) +
                         " E:" + std::to_string(experts) + " R:" + std::to_string(rank);

  const auto linear_forward = [&] {
    ops::mixed_gemm(ctx, 1.0f, std::as_const(x_close).view(), transpose::no, base.view(),
                    transpose::yes, 0.0f, y.view());
  };
  const auto forward = [&](matrix<S, gpu>& from) {
    const workspace<gpu>::scope scope(ctx.memory);
    layer.forward(ctx, p, from.view(), y.view(), mode::training);
  };
  const auto step = [&](matrix<S, gpu>& from, matrix<S, gpu>& gradient) {
    const workspace<gpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, p, from.view(), y.view(), mode::training);
    layer.backward(ctx, p, kept, from.view(), gradient.view(), dx.view(), grad_mode::overwrite,
                   mode::training);
  };
  step_graph linear(ctx, linear_forward);
  step_graph linear_step(ctx, [&] {
    linear_forward();
    ops::mixed_gemm(ctx, 1.0f, std::as_const(dy_close).view(), transpose::no, base.view(),
                    transpose::no, 0.0f, dx.view());
  });
  step_graph padded(ctx, [&] { forward(x); });
  step_graph close(ctx, [&] { forward(x_close); });
  step_graph padded_step(ctx, [&] { step(x, dy); });
  step_graph close_step(ctx, [&] { step(x_close, dy_close); });
  const std::vector<double> us =
      microseconds(ctx, {&linear, &padded, &close, &linear_step, &padded_step, &close_step});
  out.line("frozen linear forward " + at, us[0], "TFLOP/s",
           2e-6 * double(tokens) * double(width) * double(width) / us[0]);
  out.line("fused_mole_linear forward, padded rows " + at, us[1], "frozen linear", us[1] / us[0]);
  out.line("fused_mole_linear forward " + at, us[2], "frozen linear", us[2] / us[0]);
  out.line("frozen linear forward and dx " + at, us[3], "forward", us[3] / us[0]);
  out.line("fused_mole_linear step, padded rows " + at, us[4], "frozen linear and dx",
           us[4] / us[3]);
  out.line("fused_mole_linear step " + at, us[5], "frozen linear and dx", us[5] / us[3]);
}

/// A mixture of SwiGLU networks at one size, in shares of the product's rate of today; the step
/// with frozen experts, and with trained ones.
void ffn_lines(context<gpu>& ctx, report& out, const ceilings& today, index tokens, index width,
               index hidden, index experts, index chosen) {
  using S = bfloat16;
  const fused_moe_ffn<renormalised, S> layer{{chosen}, hidden, experts};
  generator random(1);
  const index rows = experts * hidden;
  const float inward = 1.0f / std::sqrt(float(width)), outward = 1.0f / std::sqrt(float(hidden));
  const auto gate = normal_matrix<S>(ctx, rows, width, inward, 3);
  const auto up = normal_matrix<S>(ctx, rows, width, inward, 4);
  const auto down = normal_matrix<S>(ctx, rows, width, outward, 5);
  auto p = layer.init(ctx, gate.view(), up.view(), down.view(), random);
  const auto wr = normal_matrix<float>(ctx, experts, width, inward, 6);
  ops::convert(ctx, wr.view(), p.router.value());
  layer.refresh(ctx, p);
  const auto x = normal_matrix<S>(ctx, tokens, width, 1.0f, 7);
  const auto dy = normal_matrix<S>(ctx, tokens, width, 1.0f, 8);
  matrix<S, gpu> y(tokens, width), dx(tokens, width);
  const auto forward = [&] {
    const workspace<gpu>::scope scope(ctx.memory);
    layer.forward(ctx, p, x.view(), y.view(), mode::training);
  };
  const auto step = [&] {
    const workspace<gpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, p, x.view(), y.view(), mode::training);
    layer.backward(ctx, p, kept, x.view(), dy.view(), dx.view(), grad_mode::overwrite,
                   mode::training);
  };
  step_graph forward_graph(ctx, forward);
  step_graph frozen(ctx, step);
  layer.train_experts(ctx, p);
  step_graph trained(ctx, step);
  const std::vector<double> us = microseconds(ctx, {&forward_graph, &frozen, &trained});
  const std::string at = " N:" + std::to_string(tokens) + " D:" + std::to_string(width) +
                         " H:" + std::to_string(hidden) + " E:" + std::to_string(experts) +
                         " k:" + std::to_string(chosen);
  const double once = 6.0 * double(tokens * chosen) * double(width) * double(hidden);
  const auto share = [&](double times, double time) {
    return times * once / time / today.flop_per_us;
  };
  out.line("fused_moe_ffn forward" + at, us[0], "share of the product", share(1.0, us[0]));
  out.line("fused_moe_ffn step, frozen experts" + at, us[1], "share of the product",
           share(2.0, us[1]));
  out.line("fused_moe_ffn step" + at, us[2], "share of the product", share(3.0, us[2]));

  // One of its products by itself.
  const workspace<gpu>::scope scope(ctx.memory);
  const auto kept = layer.forward(ctx, p, x.view(), y.view(), mode::training);
  const segments<gpu>& slots = kept.sorted.slots;
  const double product = microseconds(ctx, [&] {
    ops::mixed_grouped_gemm(ctx, slots.offsets, x.view(), slots.token_of_slot,
                            std::as_const(p.gate_up_stored).view(), transpose::yes, kept.ab);
  });
  out.line("grouped product, rows by token" + at, product, "share of the product",
           2.0 / 3.0 * once / product / today.flop_per_us);
}

/// Adapters of rank 16 beside frozen experts, 2 of 8 chosen by a router of their own, beside the
/// same experts without.
void perft_lines(context<gpu>& ctx, report& out, index tokens, index width, index hidden,
                 index experts, index chosen) {
  using S = bfloat16;
  using own_router = router<linear_scorer, renormalised>;
  constexpr index adapters = 8, rank = 16;
  const fused_perft_block<fused_moe_ffn<renormalised, S>, placement::routed<own_router>, lora>
      layer{{{chosen}, hidden, experts}, {{{}, {2}}}, {.rank = rank}, adapters};
  generator random(1);
  const index rows = experts * hidden;
  const float inward = 1.0f / std::sqrt(float(width)), outward = 1.0f / std::sqrt(float(hidden));
  const auto gate = normal_matrix<S>(ctx, rows, width, inward, 3);
  const auto up = normal_matrix<S>(ctx, rows, width, inward, 4);
  const auto down = normal_matrix<S>(ctx, rows, width, outward, 5);
  auto base = layer.base.init(ctx, gate.view(), up.view(), down.view(), random);
  base.freeze();
  auto p = layer.init(ctx, std::move(base), random);
  for (auto* w : {&p.base.router, &p.router, &p.b}) {
    const auto numbers = normal_matrix<float>(ctx, w->rows(), width, inward, 6);
    ops::convert(ctx, numbers.view(), w->value());
  }
  layer.refresh(ctx, p);
  const auto x = normal_matrix<S>(ctx, tokens, width, 1.0f, 7);
  const auto dy = normal_matrix<S>(ctx, tokens, width, 1.0f, 8);
  matrix<S, gpu> y(tokens, width), dx(tokens, width);
  const auto forward = [&](const auto& of, const auto& with) {
    const workspace<gpu>::scope scope(ctx.memory);
    of.forward(ctx, with, x.view(), y.view(), mode::training);
  };
  const auto step = [&](const auto& of, auto& with) {
    const workspace<gpu>::scope scope(ctx.memory);
    const auto kept = of.forward(ctx, with, x.view(), y.view(), mode::training);
    of.backward(ctx, with, kept, x.view(), dy.view(), dx.view(), grad_mode::overwrite,
                mode::training);
  };
  step_graph base_forward(ctx, [&] { forward(layer.base, p.base); });
  step_graph block_forward(ctx, [&] { forward(layer, p); });
  step_graph base_step(ctx, [&] { step(layer.base, p.base); });
  step_graph block_step(ctx, [&] { step(layer, p); });
  const std::vector<double> us =
      microseconds(ctx, {&base_forward, &block_forward, &base_step, &block_step});
  const std::string at = " N:" + std::to_string(tokens) + " D:" + std::to_string(width) +
                         " H:" + std::to_string(hidden) + " E:" + std::to_string(experts) +
                         " k:" + std::to_string(chosen) + " M:8 R:16";
  out.line("fused_perft_block forward" + at, us[1], "its base", us[1] / us[0]);
  out.line("fused_perft_block step" + at, us[3], "its base, frozen", us[3] / us[2]);
}

/// Each launch of one size by itself.
void stage_lines(context<gpu>& ctx, report& out, index tokens, index width, index experts,
                 index rank) {
  using S = bfloat16;
  fused_mole_linear<renormalised, S> layer{{2}, lora{.rank = rank, .alpha = 16.0}, experts};
  const index p = layer.rank_width(), g = layer.router_width();
  auto x = normal_matrix<S>(ctx, tokens, width + p, 1.0f, 6);
  auto dy = normal_matrix<S>(ctx, tokens, width + g, 1.0f, 7);
  const auto block = normal_matrix<S>(ctx, width + g, width + p, 0.02f, 8);
  matrix<float, gpu> products(tokens, g), gates(tokens, experts), dgates(tokens, experts),
      dlogits(tokens, experts), dz(tokens, p), grad(g, width);
  matrix<std::uint32_t, gpu> mask(tokens, mask_words(experts));
  matrix<S, gpu> y(tokens, width);
  const matrix_view<const S, gpu> tokens_of = std::as_const(x).view().col_range(0, width);
  const matrix_view<const S, gpu> dout = std::as_const(dy).view().col_range(0, width);
  const matrix_view<const S, gpu> w = block.view();
  const auto time = [&](const char* what, auto run) {
    const double us = microseconds(ctx, run);
    out.line(std::string("stage ") + what + " N:" + std::to_string(tokens) +
                 " D:" + std::to_string(width),
             us, "GB/s of x", 2e-3 * double(tokens) * double(width) / us);
  };
  time("[u, logits] = x [A; Wr]^T", [&] {
    ops::mixed_gemm(ctx, 1.0f, tokens_of, transpose::no, w.row_range(width, g).col_range(0, width),
                    transpose::yes, 0.0f, products.view());
  });
  const mole_rows<S, gpu> rows{std::as_const(products).view().col_range(0, experts * rank),
                               std::as_const(products).view().col_range(p, experts),
                               {},
                               gates.view(),
                               mask.view(),
                               x.view().col_range(width, p),
                               rank,
                               1.0f};
  time("mole_route", [&] { ops::mole_route(ctx, layer.selector, rows); });
  const auto statistics = make_statistics<float>(ctx.memory, experts);
  time("mole_route with statistics", [&] {
    ops::mole_route(ctx, layer.selector, rows, statistics.wanted(grad_mode::overwrite));
  });
  time("y = [x, z] [W, B]^T", [&] {
    ops::mixed_gemm(ctx, 1.0f, std::as_const(x).view(), transpose::no, w.row_range(0, width),
                    transpose::yes, 0.0f, y.view());
  });
  time("dz = dy B", [&] {
    ops::mixed_gemm(ctx, 1.0f, dout, transpose::no, w.row_range(0, width).col_range(width, p),
                    transpose::no, 0.0f, dz.view());
  });
  const mole_rows_gradient<S, gpu> gradient{
      std::as_const(dz).view(),      {}, {}, dgates.view(), dlogits.view(),
      dy.view().col_range(width, g), p};
  time("mole_route_backward",
       [&] { ops::mole_route_backward(ctx, layer.selector, rows, gradient); });
  time("dx = [dy, du] [W; A; Wr]", [&] {
    ops::mixed_gemm(ctx, 1.0f, std::as_const(dy).view(), transpose::no, w.col_range(0, width),
                    transpose::no, 0.0f, y.view());
  });
  time("dB = z^T dy", [&] {
    ops::mixed_gemm(ctx, 1.0f, std::as_const(x).view().col_range(width, experts * rank),
                    transpose::yes, dout, transpose::no, 1.0f,
                    grad.view().row_range(0, experts * rank));
  });
  time("[dA; dWr] = [du, dlogits]^T x", [&] {
    ops::mixed_gemm(ctx, 1.0f, std::as_const(dy).view().col_range(width, g), transpose::yes,
                    tokens_of, transpose::no, 0.0f, grad.view());
  });
}

template <class Selector>
void routing_line(context<gpu>& ctx, report& out, const ceilings& today, const std::string& label,
                  const Selector& selector, index tokens, index experts) {
  const auto logits = normal_matrix<float>(ctx, tokens, experts, 1.0f, 9);
  matrix<float, gpu> gates(tokens, experts), dlogits(tokens, experts);
  matrix<std::uint32_t, gpu> mask(tokens, mask_words(experts));
  const std::string at = label + " N:" + std::to_string(tokens) + " E:" + std::to_string(experts);
  const double bytes = double(tokens) * (8.0 * double(experts) + 4.0 * double(mask_words(experts)));
  const double us = microseconds(
      ctx, [&] { ops::select(ctx, selector, logits.view(), {}, gates.view(), mask.view()); });
  out.line("select " + at, us, "bytes at the copy rate", us * today.copy_bytes_per_us / bytes);
  const auto statistics = make_statistics<float>(ctx.memory, experts);
  const double measured = microseconds(ctx, [&] {
    ops::route(ctx, selector, logits.view(), {}, gates.view(), mask.view(),
               statistics.wanted(grad_mode::overwrite));
  });
  out.line("route: select with statistics " + at, measured, "select", measured / us);
  const double apart = microseconds(ctx, [&] {
    ops::select(ctx, selector, logits.view(), {}, gates.view(), mask.view());
    ops::routing_sums(ctx, {logits.view(), std::as_const(gates).view(), std::as_const(mask).view()},
                      statistics.totals, grad_mode::overwrite);
  });
  out.line("select, then routing_sums " + at, apart, "select", apart / us);
  const double back = microseconds(ctx, [&] {
    ops::select_backward(ctx, selector, logits.view(), gates.view(), mask.view(), logits.view(),
                         dlogits.view());
  });
  out.line("select_backward " + at, back, "select", back / us);
}

int run(const char* path, bool ceilings_alone) {
  if (!device_answers("device_bench")) return 77;
  context<gpu> ctx;
  report out(path);
  const ceilings today = measure_ceilings(ctx, out);
  if (ceilings_alone) return 0;
  for (const index tokens : {index{16384}, index{4096}}) {
    layer_lines(ctx, out, "top-2", renormalised{2}, tokens, 4096, 8, 16);
  }
  // A threshold that one token in four is above with normal logits, and one that none is.
  layer_lines(ctx, out, "dynamic_entropy 0.9", dynamic_entropy<>{.threshold = 0.9}, 16384, 4096, 8,
              16);
  layer_lines(ctx, out, "dynamic_entropy off", dynamic_entropy<>{.threshold = 1.0}, 16384, 4096, 8,
              16);
  layer_lines(ctx, out, "top-2", renormalised{2}, 16384, 2048, 8, 16);
  layer_lines(ctx, out, "top-2", renormalised{2}, 32, 4096, 8, 16);
  stage_lines(ctx, out, 16384, 4096, 8, 16);
  ffn_lines(ctx, out, today, 16384, 2048, 2816, 8, 2);
  ffn_lines(ctx, out, today, 4096, 2048, 1024, 64, 8);
  ffn_lines(ctx, out, today, 32, 2048, 2816, 8, 2);
  perft_lines(ctx, out, 4096, 2048, 1024, 64, 8);
  for (const index tokens : {index{65536}, index{4096}}) {
    routing_line(ctx, out, today, "top_k k:2", renormalised{2}, tokens, 8);
    routing_line(ctx, out, today, "top_k k:8", renormalised{8}, tokens, 64);
    routing_line(ctx, out, today, "top_k k:8", renormalised{8}, tokens, 128);
    routing_line(ctx, out, today, "dynamic_entropy", dynamic_entropy<>{}, tokens, 8);
    routing_line(ctx, out, today, "dynamic_entropy", dynamic_entropy<>{}, tokens, 128);
  }
  return 0;
}

}  // namespace
}  // namespace talpa::bench

int main(int count, char** arguments) {
  try {
    const bool ceilings_alone = count > 1 && std::strcmp(arguments[1], "--ceilings") == 0;
    const char* const path = count > 1 && !ceilings_alone ? arguments[1] : nullptr;
    return talpa::bench::run(path, ceilings_alone);
  } catch (const talpa::error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
