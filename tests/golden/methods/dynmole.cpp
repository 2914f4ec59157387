// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/by_mass.hpp"
#include "golden/methods/mole.hpp"
#include "golden/runner.hpp"

#include <talpa/losses/load_balance.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>

namespace talpa::golden::dynmole_method {

namespace {

/// The original divides entropies by a greatest value in float32: 6e-8 of the entropy or of its
/// derivative, which are at most about one; the auxiliary loss has 1e-2 of them.
constexpr tolerance entropy_rounding{1e-6, 1e-7};
constexpr tolerance aux_rounding{1e-6, 1e-9};

/// How masks differ; where the file says that the selection hangs on the last bit, a row whose
/// entropy is within the rounding of the original of the threshold may go either way.
template <class Selector>
std::string compare_selections(const Selector& selector, matrix_view<const double, cpu> u,
                               const routing_view<const double, cpu>& found, const tensor& mask,
                               bool sensitive) {
  const matrix<double, cpu> h = entropies(selector.entropy, u);
  for (index n = 0; n < u.rows; ++n) {
    const double off = std::abs(h(0, n) - selector.threshold);
    if (sensitive && 1.0 > selector.threshold && off <= entropy_rounding.relative) continue;
    tensor row;
    row.shape = {1, u.cols};
    const auto first = mask.data.begin() + n * u.cols;
    row.data.assign(first, first + u.cols);
    const routing_view<const double, cpu> token(found.gates.row_range(n, 1),
                                                found.mask.row_range(n, 1));
    const std::string text = compare_masks(u.row_range(n, 1), token, row, sensitive, selector.p);
    if (!text.empty()) return "row " + std::to_string(n) + ": " + text;
  }
  return {};
}

template <class Entropy>
void compare(const golden_case& c, checker& check, const Entropy& kind) {
  const matrix<double, cpu> u = c.at("inputs.logits").rows();
  const index tokens = u.rows(), experts = u.cols();
  const matrix<double, cpu> dy = c.at("inputs.upstream", {tokens, experts}).rows();
  const tensor mask = c.at("outputs.mask", {tokens, experts});
  const bool sensitive = c.flag("rounding_sensitive");
  const dynamic_entropy<Entropy> selector{.p = c.number("hparams.top_p"),
                                          .min_k = c.integer("hparams.keep_top_k"),
                                          .threshold = c.number("hparams.entropy_threshold"),
                                          .entropy = kind};
  context<cpu> ctx;
  routing<double, cpu> r(tokens, experts);
  ops::select(ctx, selector, u, {}, r.gates.view(), r.mask.view());
  check.account("outputs.mask", compare_selections(selector, u, r.view(), mask, sensitive));
  if (sensitive) {
    // Either side of the last bit is right: go on with the file's.
    r.mask = words_of(mask);
    ops::replay(ctx, selector, u, {}, r.mask.view(), r.gates.view());
  }
  check.equal("outputs.weights", r.gates, c.forward());
  check.equal("outputs.entropy", entropies(kind, u), entropy_rounding);
  check.account("outputs.max_entropy_f32", "");  // the entropies would be off if this were
  matrix<double, cpu> du(tokens, experts);
  ops::select_backward(ctx, selector, u, r.gates.view(), r.mask.view(), dy, du.view());
  check.equal("grads.grad_logits_from_weights", du, c.gradient());

  // Layers and batch one below the other; the mask is the same for each layer.
  vector<std::uint8_t, cpu> real;
  if (c.has("inputs.attention_mask")) {
    const tensor attention = c.at("inputs.attention_mask");
    real = vector<std::uint8_t, cpu>(tokens);
    for (index n = 0; n < tokens; ++n) {
      real[n] = attention.data[static_cast<std::size_t>(n % attention.size())] != 0.0 ? 1 : 0;
    }
  }
  const routed_view<double, cpu> routed{u, r.view(), real.view()};
  const entropy_loss<Entropy, balance::pooled> mean_entropy{.entropy = kind,
                                                            .include_padding = true};
  const load_balance<balance::soft_mass, balance::pooled> even{};
  const double dynamic = c.number("hparams.dyn_loss_coef");
  const double auxiliary = c.number("hparams.aux_loss_coef");
  matrix<double, cpu> from_aux(tokens, experts), from_entropy(tokens, experts);
  const double aux = dynamic * add_loss(mean_entropy, dynamic, selector, routed, from_aux.view()) +
                     auxiliary * add_loss(even, auxiliary, selector, routed, from_aux.view());
  check.equal("outputs.aux", aux, aux_rounding);
  check.equal("grads.grad_logits_from_aux", from_aux, aux_rounding);
  add_loss(mean_entropy, static_cast<double>(tokens), selector, routed, from_entropy.view());
  check.equal("grads.grad_logits_from_entropy_sum", from_entropy, entropy_rounding);
}

void dynmole(const golden_case& c, checker& check) {
  const double q = c.number("hparams.entropy_index"), epsilon = c.number("hparams.entropy_eps");
  const std::string kind = c.text("hparams.entropy_type");
  if (kind == "tsallis") {
    compare(c, check, entropy::tsallis{.q = q, .epsilon = epsilon});
  } else if (kind == "renyi") {
    compare(c, check, entropy::renyi{.q = q, .epsilon = epsilon});
  } else {
    throw malformed("'hparams.entropy_type' is " + kind);
  }
}

void dynmole_layer(const golden_case& c, checker& check) {
  using selector = dynamic_entropy<>;
  // The original computes in float32.
  constexpr tolerance float32_layer{2e-5, 1e-6};
  const index experts = c.integer("hparams.num_experts"), rank = c.integer("hparams.lora_r");
  const matrix<double, cpu> x = c.at("inputs.x").rows(), dy = c.at("inputs.upstream").rows();
  const matrix<double, cpu> residual = c.at("inputs.residual").rows();
  c.at("inputs.A", {experts, rank, x.cols()});
  c.at("inputs.B", {experts, dy.cols(), rank});
  const selector chosen{.p = c.number("hparams.top_p"),
                        .min_k = c.integer("hparams.keep_top_k"),
                        .threshold = c.number("hparams.entropy_threshold"),
                        .entropy = {.q = c.number("hparams.entropy_index"),
                                    .epsilon = c.number("hparams.entropy_eps")}};
  for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
    const mole<selector> layer =
        make_mole(chosen, experts, rank, c.number("hparams.scaling"), execution);
    // The residual stands for the base layer: a base of zeros leaves the delta, added here.
    auto p = mole_params<selector>(matrix<double, cpu>(dy.cols(), x.cols()),
                                   c.at("inputs.w_gate", {experts, x.cols()}).rows(),
                                   c.at("inputs.A").rows(), c.at("inputs.B").transposed_blocks());
    context<cpu> ctx;
    matrix<double, cpu> y(x.rows(), dy.cols()), dx(x.rows(), x.cols());
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    for (index i = 0; i < y.size(); ++i) y.data()[i] += residual.data()[i];
    check.equal("outputs.output", y, float32_layer);
    check.equal("outputs.logits", kept.routed.logits, float32_layer);
    layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
    check.equal("grads.x", dx, float32_layer);
    check.equal("grads.w_gate", p.router.scorer.weight.grad(), float32_layer);
    check.equal("grads.A", p.expert.a.grad(), float32_layer);
    check.equal("grads.B", in_blocks(p.expert.b.grad(), experts), float32_layer);
  }
}

const registration entry("routers/dynmole", dynmole);
const registration layer_entry("routers/dynmole_layer", dynmole_layer);

}  // namespace

}  // namespace talpa::golden::dynmole_method
