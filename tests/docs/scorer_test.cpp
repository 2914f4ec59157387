// SPDX-License-Identifier: Apache-2.0
// The scorer of docs/policies/scorer.md.
#include <talpa/talpa.hpp>

#include <doctest/doctest.h>

#include <string>

// [region scorer]
/// Scorer with one hidden layer: logits = silu(x V^T + c) W^T.
struct mlp_scorer {
  static constexpr const char* name = "mlp_scorer";

  talpa::index hidden = 16;  ///< H, >= 1

  template <class T, class B>
  struct params {
    talpa::affine_params<T, B> down;  // V [H, D], c [1, H]
    talpa::affine_params<T, B> up;    // W [E, H]

    template <class F>
    void visit(F f) {
      down.visit(f);
      up.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    talpa::matrix_view<T, B> a;  // [N, H] before silu
    talpa::matrix_view<T, B> h;  // [N, H] after it
  };

  template <class T, class B>
  params<T, B> init(talpa::index inputs, talpa::index experts, talpa::generator& random,
                    const std::string& prefix) const {
    talpa::check_at_least(name, "hidden", hidden, 1, "width of the hidden layer");
    params<T, B> p;
    p.down = talpa::init_affine<T, B>(inputs, hidden, true, true, random, prefix + "down.");
    p.up = talpa::init_affine<T, B>(hidden, experts, false, true, random, prefix + "up.");
    return p;
  }

  template <class T, class B>
  saved<T, B> forward(talpa::context<B>& ctx, const params<T, B>& p, talpa::input<T, B> x,
                      talpa::output<T, B> logits, talpa::mode, const talpa::batch_info<B>&) const {
    // What backward reads lives in ctx.memory, until the caller's step ends.
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, hidden),
                           ctx.memory.template take<T>(x.rows, hidden)};
    talpa::affine_forward(ctx, p.down, x, kept.a);
    talpa::ops::activation(ctx, talpa::silu{}, kept.a, kept.h);
    talpa::affine_forward(ctx, p.up, kept.h, logits);
    return kept;
  }

  template <class T, class B>
  void backward(talpa::context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                talpa::input<T, B> x, talpa::input<T, B> dlogits, talpa::output<T, B> dx,
                talpa::grad_mode dx_mode) const {
    // What only this call needs lives in ctx.scratch, until its scope ends.
    const typename talpa::workspace<B>::scope scope(ctx.scratch);
    const auto dh = ctx.scratch.template take<T>(x.rows, hidden);  // [N, H]
    talpa::affine_backward(ctx, p.up, kept.h, dlogits, dh, talpa::grad_mode::overwrite);
    talpa::ops::activation_backward(ctx, talpa::silu{}, kept.a, dh, dh,
                                    talpa::grad_mode::overwrite);
    talpa::affine_backward(ctx, p.down, x, dh, dx, dx_mode);
  }
};
static_assert(talpa::scorer_policy<mlp_scorer>);
// [end scorer]
