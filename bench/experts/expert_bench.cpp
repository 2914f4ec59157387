// SPDX-License-Identifier: Apache-2.0
//
// Experts, forward and a whole step, on one thread, beside their bare matrix products: the same
// products of the same sizes with nothing between them. `vs_products` says what gates, activations
// and everything else cost on top.
#include "beside.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

constexpr index tokens = 512, width = 768, experts = 8, chosen = 2, hidden = 256, rank = 8;

/// Which product of an expert this is: of each slot with the block of its expert, or of each token
/// (slot) with one matrix.
enum class kind { per_expert, shared };

/// x [., in] times a weight, which lies as banks do, with as many rows as its smaller size. In a
/// step it also passes a gradient back, and its weight gets one where it trains.
struct product {
  index in, out;
  kind of = kind::per_expert;
  bool trains = true;

  bool transposed() const { return in < out; }
  index rows() const { return transposed() ? in : out; }
  index cols() const { return transposed() ? out : in; }
};

/// Tokens that take two of eight experts each, in expert order.
struct workload {
  workload()
      : ctx(1),
        random(1),
        x(bench::normal_matrix(tokens, width, 1.0, random)),
        dy(bench::normal_matrix(tokens, width, 1.0, random)),
        gates(tokens, experts),
        mask(tokens, mask_words(experts)) {
    for (index n = 0; n < tokens; ++n) {
      const index first = n % experts, second = (n + 1 + n / experts % (experts - 1)) % experts;
      mask(n, 0) = 1u << first | 1u << second;
      gates(n, first) = 0.75f;
      gates(n, second) = 0.25f;
    }
    slots = make_segments(ctx.memory, tokens, experts, tokens * chosen);
    slot_gates = ctx.memory.take<float>(tokens * chosen);
    ops::build_segments(ctx, mask.view(), gates.view(), slots, slot_gates);
    x_slots = matrix<float, cpu>(tokens * chosen, width);
    dy_slots = matrix<float, cpu>(tokens * chosen, width);
    ops::gather(ctx, slots, x.view(), x_slots.view());
    ops::gather(ctx, slots, dy.view(), dy_slots.view());
  }

  context<cpu> ctx;
  generator random;
  matrix<float, cpu> x, dy;  // [N, D]
  matrix<float, cpu> gates;  // [N, E]
  matrix<std::uint32_t, cpu> mask;
  segments<cpu> slots;
  vector_view<float, cpu> slot_gates;    // [S]
  matrix<float, cpu> x_slots, dy_slots;  // [S, D]
};

/// The products of an expert alone, over `rows` tokens or slots.
class bare_products {
 public:
  bare_products(workload& work, const std::vector<product>& products, index rows) : work_(work) {
    for (const product& p : products) {
      const index blocks = p.of == kind::per_expert ? experts : 1;
      parts_.push_back({p, bench::normal_matrix(rows, p.in, 1.0, work.random),
                        bench::normal_matrix(rows, p.out, 1.0, work.random),
                        bench::normal_matrix(blocks * p.rows(), p.cols(), 1.0, work.random),
                        matrix<float, cpu>(blocks * p.rows(), p.cols())});
    }
  }
  void run(bool step) {
    for (part& p : parts_) {
      const bool turned = p.what.transposed();
      const transpose forth = turned ? transpose::no : transpose::yes;
      const transpose back = turned ? transpose::yes : transpose::no;
      const matrix<float, cpu>&left = turned ? p.in : p.out, &right = turned ? p.out : p.in;
      context<cpu>& ctx = work_.ctx;
      if (p.what.of == kind::per_expert) {
        const row_run all{0, p.weight.rows(), 0};
        const auto offsets = work_.slots.offsets;
        ops::grouped_gemm(ctx, offsets, p.in, p.weight, forth, p.out.view());
        if (!step) continue;
        if (p.what.trains) {
          ops::grouped_gemm_gradient(ctx, offsets, left, right, std::span<const row_run>(&all, 1),
                                     p.gradient.view());
        }
        ops::grouped_gemm(ctx, offsets, p.out, p.weight, back, p.in.view());
      } else {
        ops::gemm(ctx, p.in, transpose::no, p.weight, forth, 0.0f, p.out.view());
        if (!step) continue;
        if (p.what.trains) {
          ops::gemm(ctx, left, transpose::yes, right, transpose::no, 1.0f, p.gradient.view());
        }
        ops::gemm(ctx, p.out, transpose::no, p.weight, back, 0.0f, p.in.view());
      }
    }
  }

 private:
  struct part {
    product what;
    matrix<float, cpu> in, out, weight, gradient;
  };
  workload& work_;
  std::vector<part> parts_;
};

std::string name_of(const std::string& expert, const char* form, bool step) {
  return "experts/" + expert + "/" + form + (step ? "/step" : "/forward") +
         "/N:" + std::to_string(tokens) + "/D:" + std::to_string(width) +
         "/E:" + std::to_string(experts) + "/K:" + std::to_string(chosen) + "/f32/cpu";
}

/// Leaves to `prepare` what init does not: networks that do not train.
template <class Expert, class Prepare>
void add_grouped(const std::string& name, const Expert& expert,
                 const std::vector<product>& products, Prepare prepare) {
  for (const bool step : {false, true}) {
    const std::string full = name_of(name, "grouped", step);
    benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State& state) {
      workload work;
      auto p = expert.template init<float, cpu>(width, width, experts, work.random, "");
      prepare(p);
      const index rows = work.slots.capacity();
      matrix<float, cpu> y(rows, width), dx(rows, width);
      vector<float, cpu> dgates(rows);
      bare_products bare(work, products, rows);
      const auto pass = [&] {
        const workspace<cpu>::scope scope(work.ctx.memory);
        const auto kept = expert.forward_grouped(work.ctx, p, work.slots, work.slot_gates,
                                                 work.x_slots, y.view());
        if (!step) return;
        expert.backward_grouped(work.ctx, p, kept, work.slots, work.slot_gates, work.x_slots,
                                work.dy_slots, dgates.view(), dx.view(), grad_mode::overwrite);
      };
      bench::time_beside(state, tokens, pass, "products", [&] { bare.run(step); });
    })->UseManualTime();
  }
}
template <class Expert>
void add_grouped(const std::string& name, const Expert& expert,
                 const std::vector<product>& products) {
  add_grouped(name, expert, products, [](auto&) {});
}

template <class Expert, class Prepare>
void add_masked(const std::string& name, const Expert& expert, const std::vector<product>& products,
                Prepare prepare) {
  for (const bool step : {false, true}) {
    const std::string full = name_of(name, "dense_masked", step);
    benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State& state) {
      workload work;
      auto p = expert.template init<float, cpu>(width, width, experts, work.random, "");
      prepare(p);
      matrix<float, cpu> y(tokens, width), dx(tokens, width), dgates(tokens, experts);
      bare_products bare(work, products, tokens);
      const auto pass = [&] {
        const workspace<cpu>::scope scope(work.ctx.memory);
        const auto kept = expert.forward_masked(work.ctx, p, work.gates, work.x, y.view());
        if (!step) return;
        expert.backward_masked(work.ctx, p, kept, work.gates, work.x, work.dy, dgates.view(),
                               dx.view(), grad_mode::overwrite);
      };
      bench::time_beside(state, tokens, pass, "products", [&] { bare.run(step); });
    })->UseManualTime();
  }
}
template <class Expert>
void add_masked(const std::string& name, const Expert& expert,
                const std::vector<product>& products) {
  add_masked(name, expert, products, [](auto&) {});
}

void add_all() {
  const std::vector<product> low_rank{{width, rank}, {rank, width}};
  const index ranks = experts * rank;
  const std::vector<product> all_ranks{{width, ranks, kind::shared}, {ranks, width, kind::shared}};
  const auto both = [&](const std::string& name, const auto& expert) {
    add_grouped(name, expert, low_rank);
    add_masked(name, expert, all_ranks);
  };
  both("lora", lora{.rank = rank});
  // The same number of ranks in all.
  both("mixed_rank_lora", mixed_rank_lora{.ranks = {2, 4, 6, 8, 8, 10, 12, 14}});
  both("parallel_adapter", parallel_adapter<>{.rank = rank});

  add_grouped("shared_a_lora", shared_a_lora{.rank = rank},
              {{width, rank, kind::shared}, {rank, width}});
  add_masked("shared_a_lora", shared_a_lora{.rank = rank},
             {{width, rank, kind::shared}, {ranks, width, kind::shared}});
  add_grouped("shared_b_lora", shared_b_lora{.rank = rank},
              {{width, rank}, {rank, width, kind::shared}});
  add_masked("shared_b_lora", shared_b_lora{.rank = rank},
             {{width, ranks, kind::shared}, {rank, width, kind::shared}});

  // Products with the frozen base beside those of the ranks; what the lengths of V cost is on top.
  const dora weight{.rank = rank};
  const auto frozen_base = [](auto& p) { p.base.freeze(); };
  const product base{width, width, kind::shared, false};
  add_grouped("dora", weight, {{width, rank}, {rank, width}, base}, frozen_base);
  add_masked("dora", weight, {all_ranks[0], all_ranks[1], base}, frozen_base);
  add_grouped("dora_constant_norm", dora{.rank = rank, .norm = dora_norm::constant},
              {{width, rank}, {rank, width}, base}, frozen_base);

  add_grouped("mlp", mlp<relu>{.hidden = hidden}, {{width, hidden}, {hidden, width}});
  const std::vector<product> network{{width, hidden}, {width, hidden}, {hidden, width}};
  add_grouped("swiglu", swiglu{.hidden = hidden}, network);
  std::vector<product> adapted{{width, rank},  {rank, hidden}, {width, rank},
                               {rank, hidden}, {hidden, rank}, {rank, width}};
  for (product p : network) {
    p.trains = false;
    adapted.push_back(p);
  }
  add_grouped("adapted_glu",
              adapted_glu<swiglu, lora>{.network = {.hidden = hidden}, .adapter = {.rank = rank}},
              adapted, [](auto& p) { p.network.freeze(); });
}

const int registered = (add_all(), 0);

}  // namespace
