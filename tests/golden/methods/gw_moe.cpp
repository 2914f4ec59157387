// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/by_mass.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/router_z.hpp>
#include <talpa/selectors/broadcast.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/top_k.hpp>

#include <algorithm>

namespace talpa::golden::gw_moe_method {

namespace {

/// The Switch form: capacity of each sequence, by position.
using switched =
    capacity_top_k<gate::raw, overflow::by_position, capacity::fixed, capacity::per_sequence>;

/// One feed-forward expert wo relu(wi x), in plain loops.
struct feed_forward {
  const double* wi;  // [F, D]
  const double* wo;  // [D, F]
  index inputs, width;

  std::vector<double> hidden(const double* x) const {
    std::vector<double> h(static_cast<std::size_t>(width), 0.0);
    for (index f = 0; f < width; ++f) {
      double sum = 0.0;
      for (index d = 0; d < inputs; ++d) sum += wi[f * inputs + d] * x[d];
      h[static_cast<std::size_t>(f)] = std::max(sum, 0.0);
    }
    return h;
  }
  std::vector<double> operator()(const double* x) const {
    const std::vector<double> h = hidden(x);
    std::vector<double> y(static_cast<std::size_t>(inputs), 0.0);
    for (index d = 0; d < inputs; ++d) {
      for (index f = 0; f < width; ++f)
        y[static_cast<std::size_t>(d)] += wo[d * width + f] * h[static_cast<std::size_t>(f)];
    }
    return y;
  }
  /// Adds the gradients of scale * sum of dy (*this)(x).
  void backward(const double* x, const double* dy, double scale, double* dx, double* dwi,
                double* dwo) const {
    const std::vector<double> h = hidden(x);
    for (index f = 0; f < width; ++f) {
      const double active = h[static_cast<std::size_t>(f)];
      double dh = 0.0;
      for (index d = 0; d < inputs; ++d) {
        dh += scale * dy[d] * wo[d * width + f];
        dwo[d * width + f] += scale * dy[d] * active;
      }
      if (active <= 0.0) continue;
      for (index d = 0; d < inputs; ++d) {
        dwi[f * inputs + d] += dh * x[d];
        dx[d] += dh * wi[f * inputs + d];
      }
    }
  }
};

/// x w^T.
matrix<double, cpu> scores(const matrix<double, cpu>& x, const matrix<double, cpu>& w) {
  matrix<double, cpu> u(x.rows(), w.rows());
  for (index n = 0; n < x.rows(); ++n) {
    for (index e = 0; e < w.rows(); ++e) {
      for (index d = 0; d < x.cols(); ++d) u(n, e) += x(n, d) * w(e, d);
    }
  }
  return u;
}
/// du^T x: the gradient of w.
matrix<double, cpu> weight_gradient(const matrix<double, cpu>& du, const matrix<double, cpu>& x) {
  matrix<double, cpu> dw(du.cols(), x.cols());
  for (index n = 0; n < x.rows(); ++n) {
    for (index e = 0; e < du.cols(); ++e) {
      for (index d = 0; d < x.cols(); ++d) dw(e, d) += du(n, e) * x(n, d);
    }
  }
  return dw;
}

template <class Selector>
void compare(const golden_case& c, checker& check, const Selector& configured) {
  const tensor shape = c.at("inputs.hidden");
  const index length = shape.dim(1), inputs = shape.dim(2);
  const matrix<double, cpu> x = shape.rows(), dy = c.at("inputs.upstream").rows();
  const matrix<double, cpu> w = c.at("inputs.w_router").rows();
  const index tokens = x.rows(), experts = w.rows();
  const tensor wi = c.at("inputs.wi"), wo = c.at("inputs.wo", {experts, inputs, wi.dim(1)});
  const index width = wi.dim(1);
  const auto expert = [&](index e) {
    return feed_forward{wi.data.data() + e * width * inputs, wo.data.data() + e * width * inputs,
                        inputs, width};
  };

  const Selector selector =
      configured.at(c.flag("hparams.training") ? mode::training : mode::inference);
  const matrix<double, cpu> u = scores(x, w);
  context<cpu> ctx;
  select_inputs<double, cpu> more;
  more.sequence_length = length;
  routing<double, cpu> r(tokens, experts), certain(tokens, experts);
  ops::select(ctx, selector, u, {}, r.gates.view(), r.mask.view(), more);
  ops::select(ctx, selector.inner, u, {}, certain.gates.view(), certain.mask.view(), more);
  check.equal("outputs.weights", r.gates, c.forward());
  const matrix<double, cpu> h =
      entropies(entropy::shannon{.log_epsilon = 1e-5, .normalised = false}, u);
  matrix<double, cpu> entropy(tokens / length, length), uncertain(tokens / length, length);
  for (index n = 0; n < tokens; ++n) {
    entropy(n / length, n % length) = h(0, n);
    // A token is broadcast where its gates are the whole softmax.
    index on = 0;
    for (index e = 0; e < experts; ++e) on += r.view().on(n, e) ? 1 : 0;
    const bool all = on == experts && (experts > 1 || selector.threshold <= h(0, n));
    uncertain(n / length, n % length) = all && selector.broadcasting ? 1.0 : 0.0;
  }
  check.equal("outputs.entropy", entropy, c.forward());
  check.equal("outputs.uncertain", uncertain, {});

  // A token that is dropped passes by its best expert with that one's probability.
  matrix<double, cpu> y(tokens, inputs), dx(tokens, inputs), dgates(tokens, experts);
  matrix<double, cpu> du(tokens, experts);
  tensor dwi = wi, dwo = wo;
  std::fill(dwi.data.begin(), dwi.data.end(), 0.0);
  std::fill(dwo.data.begin(), dwo.data.end(), 0.0);
  for (index n = 0; n < tokens; ++n) {
    for (index e = 0; e < experts; ++e) {
      if (!r.view().on(n, e)) continue;
      const feed_forward f = expert(e);
      const std::vector<double> value = f(x.view().row(n));
      for (index d = 0; d < inputs; ++d) {
        y(n, d) += r.gates(n, e) * value[static_cast<std::size_t>(d)];
        dgates(n, e) += dy(n, d) * value[static_cast<std::size_t>(d)];
      }
      f.backward(x.view().row(n), dy.view().row(n), r.gates(n, e), dx.view().row(n),
                 dwi.data.data() + e * width * inputs, dwo.data.data() + e * width * inputs);
    }
  }
  ops::select_backward(ctx, selector, u, r.gates.view(), r.mask.view(), dgates, du.view(), more);
  for (index n = 0; n < tokens; ++n) {
    index on = 0;
    for (index e = 0; e < experts; ++e) on += r.view().on(n, e) ? 1 : 0;
    if (on > 0) continue;
    const double* const row = u.view().row(n);
    const index best = std::max_element(row, row + experts) - row;
    double sum = 0.0, dbest = 0.0;
    for (index e = 0; e < experts; ++e) sum += std::exp(row[e] - row[best]);
    for (index d = 0; d < inputs; ++d) {
      y(n, d) = x(n, d) / sum;
      dx(n, d) = dy(n, d) / sum;
      dbest += dy(n, d) * x(n, d);
    }
    for (index e = 0; e < experts; ++e) {
      du(n, e) = dbest / sum * ((e == best ? 1.0 : 0.0) - std::exp(row[e] - row[best]) / sum);
    }
  }
  for (index n = 0; n < tokens; ++n) {
    for (index e = 0; e < experts; ++e) {
      for (index d = 0; d < inputs; ++d) dx(n, d) += du(n, e) * w(e, d);
    }
  }
  check.equal("outputs.output", y, c.forward());
  check.equal("grads.hidden", dx, c.gradient());
  check.equal("grads.w_router", weight_gradient(du, x), c.gradient());
  check.equal("grads.wi", dwi.rows(), c.gradient());
  check.equal("grads.wo", dwo.rows(), c.gradient());

  // The losses look at the best expert of each token, whatever k is; a token that the capacity
  // dropped counts for expert 0.
  for (index n = 0; n < tokens; ++n) {
    const double* const row = u.view().row(n);
    const index best = std::max_element(row, row + experts) - row;
    certain.mask(n, 0) = certain.view().on(n, best) ? 1u << best : 1u;
  }
  const routed_view<double, cpu> routed{u, certain.view(), {}, length};
  matrix<double, cpu> from_z(tokens, experts), from_balance(tokens, experts);
  check.equal("outputs.z_loss", add_loss(router_z{}, 1.0, selector, routed, from_z.view()),
              c.forward());
  check.equal("grads.w_router_from_z_loss", weight_gradient(from_z, x), c.gradient());
  // The original forms the shares of experts in float32.
  check.equal("outputs.balance",
              add_loss(load_balance<balance::per_token, balance::per_sequence>{}, 1.0, selector,
                       routed, from_balance.view()),
              float32_inside);
  check.equal("grads.w_router_from_balance", weight_gradient(from_balance, x), float32_inside);
}

template <class Inner>
void by_slots(const golden_case& c, checker& check, const Inner& inner) {
  const std::string kind = c.text("hparams.threshold_kind");
  if (kind != "nats" && kind != "normalized")
    throw malformed("'hparams.threshold_kind' is " + kind);
  const entropy::shannon entropy{.log_epsilon = 1e-5, .normalised = kind == "normalized"};
  const double threshold = c.number("hparams.threshold");
  const index most = c.integer("hparams.max_num_slots");
  if (most < 0) {
    compare(c, check, broadcast<Inner>{.inner = inner, .threshold = threshold, .entropy = entropy});
  } else {
    compare(
        c, check,
        broadcast<Inner, entropy::shannon, slots::per_sequence>{
            .inner = inner, .threshold = threshold, .entropy = entropy, .slots = {.most = most}});
  }
}

void gw_moe(const golden_case& c, checker& check) {
  const index k = c.integer("hparams.top_k");
  if (c.has("hparams.expert_capacity")) {
    by_slots(c, check,
             switched{.k = k, .capacity = {.tokens = c.integer("hparams.expert_capacity")}});
  } else {
    by_slots(c, check, top_k<gate::softmax_selected>{.k = k});
  }
}

const registration entry("routers/gw_moe", gw_moe);

}  // namespace

}  // namespace talpa::golden::gw_moe_method
