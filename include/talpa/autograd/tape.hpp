// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/activation.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/bias.hpp>
#include <talpa/ops/copy.hpp>
#include <talpa/ops/cross_entropy.hpp>
#include <talpa/ops/dropout.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/layer_norm.hpp>
#include <talpa/ops/mse.hpp>
#include <talpa/ops/mul.hpp>
#include <talpa/ops/reduce.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/ops/softmax.hpp>
#include <talpa/routing/routing.hpp>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace talpa {

template <floating T, backend B>
class tape;

/// Handle of a matrix that a tape made or was given: cheap to copy, valid until the tape's reset.
template <floating T, backend B>
class variable {
 public:
  variable() = default;

  /// The matrix, until the tape's reset. Throws value_error for a handle that is not valid.
  matrix_view<const T, B> value() const;
  /// What the last backward left for it, zeros where nothing arrived. Throws value_error for a
  /// variable that wants no gradient.
  matrix_view<const T, B> grad() const;
  /// Whether it depends on a leaf or on a parameter that trains.
  bool wants_grad() const;

 private:
  friend class tape<T, B>;
  variable(tape<T, B>* owner, index node, index step) : owner_(owner), node_(node), step_(step) {}

  tape<T, B>* owner_ = nullptr;
  index node_ = -1;
  index step_ = -1;
};

/// Handle of what the router of an applied layer did; losses take it.
template <floating T, backend B>
class routed_variable {
 public:
  routed_variable() = default;

  /// Logits, gates and mask, until the tape's reset. Throws value_error for a handle that is not
  /// valid.
  routed_view<T, B> view() const;

 private:
  friend class tape<T, B>;
  routed_variable(tape<T, B>* owner, index entry, index step)
      : owner_(owner), entry_(entry), step_(step) {}

  tape<T, B>* owner_ = nullptr;
  index entry_ = -1;
  index step_ = -1;
};

/// What stands in place of a routed_variable for a layer without a router.
struct layer_without_router {};

/// Result of tape::apply: the output, and the routing where the layer has one.
template <floating T, backend B, class Routed>
struct applied {
  variable<T, B> y;
  Routed routed;
};

/// Where the backward of a node writes the gradient of one input, and how: nothing (the view is
/// then empty), overwrite or accumulate.
template <floating T, backend B>
struct gradient_target {
  matrix_view<T, B> grad;
  grad_mode mode = grad_mode::ignore;
};

/// One term of tape::weighted_sum.
template <floating T, backend B>
struct weighted_term {
  variable<T, B> value;  // [1, 1]
  T weight = T{1};
};

/// Records a computation and runs it backwards: the thin optional layer above forward and backward.
///
/// Memory: values, saved and gradients lie in ctx.memory from the tape's construction until reset()
/// or its end, whichever comes first; in between nobody else may rewind ctx.memory past the tape's
/// use of it. Backward closures lie in an arena of the tape on the host. Both keep their capacity,
/// so from the second equal step on the tape and the arenas of the context allocate nothing; what a
/// backend does inside a product is its own (docs/adr/0009-eigen-inside-our-loops.md).
/// Gradients: backward overwrites the gradients of variables (the first consumer writes, later ones
/// add) and adds to those of parameters, so zero_grad belongs to each step. What depends on no leaf
/// and on no parameter that trains gets no gradient, no memory for one and no backward. Parameters,
/// and what constant, leaf, labels and batch show, must outlive the step.
/// Determinism: one order, that of recording, backwards; same bits for any number of threads.
/// Throws: shape_error, value_error before any work; value_error for a variable of another tape or
/// from before a reset.
///
///   tape<float, cpu> t(ctx);
///   for (...) {
///     const auto h = t.activation(silu{}, t.linear(t.constant(x), w1, b1));
///     const auto loss = t.cross_entropy(t.linear(h, w2, b2), labels);
///     t.backward(loss);
///     optimiser.step(ctx);
///     optimiser.zero_grad(ctx);
///     t.reset();
///   }
template <floating T, backend B>
class tape {
 public:
  using variable_type = variable<T, B>;
  using target_type = gradient_target<T, B>;

  explicit tape(context<B>& ctx) : ctx_(ctx), start_(ctx.memory.position()) {}
  tape(const tape&) = delete;
  tape& operator=(const tape&) = delete;
  ~tape() { ctx_.memory.rewind(start_); }

  context<B>& executor() { return ctx_; }

  // ---- inputs ----------------------------------------------------------------------------------

  /// A matrix of somebody else that wants no gradient.
  variable_type constant(input<T, B> value) { return add_node(value, false); }
  /// A matrix of somebody else whose gradient is wanted: grad() after backward.
  variable_type leaf(input<T, B> value) { return add_node(value, true); }
  /// A parameter as a variable; its gradient is added to p.grad() where p trains.
  variable_type weight(parameter<T, B>& p) {
    const matrix_view<const T, B> value = p.value();
    return record(
        value, {},
        [source = &p](context<B>& ctx, matrix_view<const T, B> dy, std::span<const target_type>) {
          for (const row_run& run : source->trained()) {
            ops::axpy(ctx, T{1}, dy.row_range(run.first, run.rows),
                      source->grad().row_range(run.grad_first, run.rows));
          }
        },
        p.trainable());
  }

  // ---- dense nets ------------------------------------------------------------------------------

  /// y = x W^T. Shapes: x [N, D], W [O, D], y [N, O]. Only rows of W that train get a gradient.
  variable_type linear(const variable_type& x, parameter<T, B>& weight) {
    return linear_with(x, weight, nullptr);
  }
  /// y = x W^T + b. Shapes: b [1, O]; a parameter that does not exist stands for no bias.
  variable_type linear(const variable_type& x, parameter<T, B>& weight, parameter<T, B>& bias) {
    return linear_with(x, weight, bias.exists() ? &bias : nullptr);
  }

  /// a + b, of one shape.
  variable_type add(const variable_type& a, const variable_type& b) {
    const matrix_view<const T, B> av = at("tape::add", "a", a).value;
    const matrix_view<const T, B> bv = at("tape::add", "b", b).value;
    check_shape("tape::add", "b", bv, av.rows, av.cols, "shape of a");
    const matrix_view<T, B> y = make(av.rows, av.cols);
    ops::add(ctx_, av, bv, y);
    return record(
        y, {a, b},
        [](context<B>& ctx, matrix_view<const T, B> dy, std::span<const target_type> targets) {
          for (const target_type& t : targets) pass(ctx, T{1}, dy, t);
        });
  }

  /// a b element by element, of one shape.
  variable_type mul(const variable_type& a, const variable_type& b) {
    const matrix_view<const T, B> av = at("tape::mul", "a", a).value;
    const matrix_view<const T, B> bv = at("tape::mul", "b", b).value;
    check_shape("tape::mul", "b", bv, av.rows, av.cols, "shape of a");
    const matrix_view<T, B> y = make(av.rows, av.cols);
    ops::mul(ctx_, av, bv, y);
    return record(y, {a, b},
                  [av, bv](context<B>& ctx, matrix_view<const T, B> dy,
                           std::span<const target_type> targets) {
                    ops::mul(ctx, dy, bv, targets[0].grad, targets[0].mode);
                    ops::mul(ctx, dy, av, targets[1].grad, targets[1].mode);
                  });
  }

  /// factor x.
  variable_type scale(const variable_type& x, T factor) {
    const matrix_view<const T, B> xv = at("tape::scale", "x", x).value;
    const matrix_view<T, B> y = make(xv.rows, xv.cols);
    ops::scale(ctx_, factor, xv, y);
    return record(
        y, {x},
        [factor](context<B>& ctx, matrix_view<const T, B> dy,
                 std::span<const target_type> targets) { pass(ctx, factor, dy, targets[0]); });
  }

  /// The numbers of x, row after row, as a matrix [rows, cols] on the same memory: the tokens of a
  /// sequence side by side in one row, say. Throws: shape_error for another number of them,
  /// value_error for rows of x that do not follow one another in memory.
  variable_type reshape(const variable_type& x, index rows, index cols) {
    const matrix_view<const T, B> xv = at("tape::reshape", "x", x).value;
    check_at_least("tape::reshape", "rows", rows, 0, "rows of the result");
    check_at_least("tape::reshape", "cols", cols, 0, "columns of the result");
    if (rows * cols != xv.size()) {
      detail::throw_shape("tape::reshape", "x", xv.rows, xv.cols, rows, cols, "as many numbers");
    }
    if (xv.rows > 1 && xv.stride != xv.cols) {
      detail::throw_value("tape::reshape", "x",
                          detail::concat("a view of stride ", std::to_string(xv.stride)),
                          detail::concat(std::to_string(xv.cols), " = columns, rows without gaps"));
    }
    return record(
        matrix_view<const T, B>(xv.data, rows, cols), {x},
        [xv](context<B>& ctx, matrix_view<const T, B> dy, std::span<const target_type> targets) {
          pass(ctx, T{1}, {dy.data, xv.rows, xv.cols}, targets[0]);
        });
  }

  /// f(x) element by element: `activation(silu{}, x)`, see ops/activation.hpp.
  template <activation_function F>
  variable_type activation(const F& f, const variable_type& x) {
    const matrix_view<const T, B> xv = at("tape::activation", "x", x).value;
    const matrix_view<T, B> y = make(xv.rows, xv.cols);
    ops::activation(ctx_, f, xv, y);
    return record(
        y, {x},
        [f, xv](context<B>& ctx, matrix_view<const T, B> dy, std::span<const target_type> targets) {
          ops::activation_backward(ctx, f, xv, dy, targets[0].grad, targets[0].mode);
        });
  }

  /// Row softmax, see ops/softmax.hpp.
  variable_type softmax(const variable_type& x) {
    const matrix_view<const T, B> xv = at("tape::softmax", "x", x).value;
    const matrix_view<T, B> y = make(xv.rows, xv.cols);
    ops::softmax(ctx_, xv, y);
    return record(
        y, {x},
        [y](context<B>& ctx, matrix_view<const T, B> dy, std::span<const target_type> targets) {
          ops::softmax_backward(ctx, y, dy, targets[0].grad, targets[0].mode);
        });
  }

  /// Row normalisation with gamma and beta [1, D], see ops/layer_norm.hpp.
  variable_type layer_norm(const variable_type& x, parameter<T, B>& gamma, parameter<T, B>& beta,
                           T epsilon = static_cast<T>(1e-5)) {
    const matrix_view<const T, B> xv = at("tape::layer_norm", "x", x).value;
    check_shape("tape::layer_norm", "gamma", gamma.value(), 1, xv.cols, "one row, columns of x");
    check_shape("tape::layer_norm", "beta", beta.value(), 1, xv.cols, "one row, columns of x");
    const matrix_view<T, B> y = make(xv.rows, xv.cols);
    const layer_norm_saved<T, B> saved =
        ops::layer_norm(ctx_, xv, gamma.value(), beta.value(), epsilon, y);
    return record(
        y, {x},
        [xv, saved, g = &gamma, b = &beta](context<B>& ctx, matrix_view<const T, B> dy,
                                           std::span<const target_type> targets) {
          ops::layer_norm_backward(ctx, saved, xv, g->value(), dy, targets[0].grad, targets[0].mode,
                                   g->grad(), added_if(g->trainable()), b->grad(),
                                   added_if(b->trainable()));
        },
        gamma.trainable() || beta.trainable());
  }

  /// Inverted dropout with the mask of `stream`, see ops/dropout.hpp.
  variable_type dropout(const variable_type& x, random_stream stream, float keep_probability) {
    const matrix_view<const T, B> xv = at("tape::dropout", "x", x).value;
    const matrix_view<T, B> y = make(xv.rows, xv.cols);
    ops::dropout(ctx_, stream, keep_probability, xv, y);
    return record(y, {x},
                  [stream, keep_probability](context<B>& ctx, matrix_view<const T, B> dy,
                                             std::span<const target_type> targets) {
                    ops::dropout_backward(ctx, stream, keep_probability, dy, targets[0].grad,
                                          targets[0].mode);
                  });
  }

  // ---- losses ----------------------------------------------------------------------------------

  /// Mean cross entropy of logits [N, C] with labels [N] as a [1, 1], see ops/cross_entropy.hpp.
  variable_type cross_entropy(const variable_type& logits, vector_input<std::int32_t, B> labels) {
    const matrix_view<const T, B> x = at("tape::cross_entropy", "logits", logits).value;
    check_size("tape::cross_entropy", "labels", labels, x.rows, "rows of logits");
    const matrix_view<T, B> value = make(1, 1);
    const cross_entropy_saved<T, B> saved = ops::cross_entropy(ctx_, x, labels, value);
    return record(value, {logits},
                  [x, labels, saved](context<B>& ctx, matrix_view<const T, B> dvalue,
                                     std::span<const target_type> targets) {
                    ops::cross_entropy_backward(ctx, saved, x, labels, dvalue, targets[0].grad,
                                                targets[0].mode);
                  });
  }

  /// Mean squared difference of y and target as a [1, 1], see ops/mse.hpp.
  variable_type mse(const variable_type& y, const variable_type& target) {
    const matrix_view<const T, B> yv = at("tape::mse", "y", y).value;
    const matrix_view<const T, B> tv = at("tape::mse", "target", target).value;
    check_shape("tape::mse", "target", tv, yv.rows, yv.cols, "shape of y");
    const matrix_view<T, B> value = make(1, 1);
    ops::mse(ctx_, yv, tv, value);
    return record(value, {y, target},
                  [yv, tv](context<B>& ctx, matrix_view<const T, B> dvalue,
                           std::span<const target_type> targets) {
                    ops::mse_backward(ctx, yv, tv, dvalue, targets[0].grad, targets[0].mode);
                    ops::mse_backward(ctx, tv, yv, dvalue, targets[1].grad, targets[1].mode);
                  });
  }

  /// Sum of weight times value over [1, 1] terms: a task loss and its auxiliary losses. 0 of none.
  variable_type weighted_sum(std::initializer_list<weighted_term<T, B>> terms) {
    return weighted_sum(std::span<const weighted_term<T, B>>(terms.begin(), terms.size()));
  }
  variable_type weighted_sum(std::span<const weighted_term<T, B>> terms) {
    for (const weighted_term<T, B>& term : terms) {
      check_shape("tape::weighted_sum", "terms",
                  at("tape::weighted_sum", "terms", term.value).value, 1, 1, "one number");
    }
    const matrix_view<T, B> sum = make(1, 1);
    ops::fill(ctx_, T{0}, sum);
    const std::span<T> weights = host_array<T>(terms.size());
    const std::span<variable_type> inputs = host_array<variable_type>(terms.size());
    for (std::size_t i = 0; i < terms.size(); ++i) {
      weights[i] = terms[i].weight;
      inputs[i] = terms[i].value;
      ops::axpy(ctx_, weights[i], inputs[i].value(), sum);
    }
    return record(sum, std::span<const variable_type>(inputs),
                  [weights](context<B>& ctx, matrix_view<const T, B> dy,
                            std::span<const target_type> targets) {
                    for (std::size_t i = 0; i < targets.size(); ++i) {
                      pass(ctx, weights[i], dy, targets[i]);
                    }
                  });
  }

  // ---- layers and losses of routers ------------------------------------------------------------

  /// Applies a layer: any type with
  ///   index output_width(const params&) const;
  ///   saved forward(ctx, params&, x, y, mode, const batch_info<T, B>&) const;
  ///   void backward(ctx, params&, const saved&, x, dy, dx, grad_mode dx_mode,
  ///                 const routed_gradient<T, B>* from_losses) const;
  /// The layer is copied, params must outlive the step. Layer and saved are plain values (trivially
  /// destructible). When saved has a member `routed` (routed_view<T, B>), the result carries a
  /// handle of it for apply_loss; from_losses is null when no loss reached it.
  /// Where params has `visit`, a layer of which nothing trains on an x without gradient is a
  /// constant; without `visit` it counts as trained.
  template <class Layer, class Params>
  auto apply(const Layer& layer, Params& params, const variable_type& x, mode m,
             const batch_info<T, B>& batch = {}) {
    const matrix_view<const T, B> xv = at("tape::apply", "x", x).value;
    const matrix_view<T, B> y = make(xv.rows, layer.output_width(params));
    const auto saved = layer.forward(ctx_, params, xv, y, m, batch);
    using saved_type = std::remove_cv_t<decltype(saved)>;
    static_assert(
        std::is_trivially_destructible_v<saved_type>,
        "talpa: tape::apply keeps what forward saves in an arena, the layer's saved<T, B> "
        "must be trivially destructible: views, not owners (docs/autograd.md)");
    static_assert(std::is_trivially_destructible_v<Layer>,
                  "talpa: tape::apply copies the layer into an arena, a layer must be trivially "
                  "destructible: numbers and policies, not owners (docs/autograd.md)");
    constexpr bool routes = requires { saved.routed; };
    index entry = -1;
    if constexpr (routes) {
      entry = static_cast<index>(routed_.size());
      routed_.push_back({});
      routed_.back().view = saved.routed;
    }
    const variable_type result = record(
        y, {x},
        [this, layer, saved, xv, p = &params, entry](context<B>& ctx, matrix_view<const T, B> dy,
                                                     std::span<const target_type> targets) {
          const routed_gradient<T, B>* from_losses = nullptr;
          if (entry >= 0) {
            const routed_entry& routed = routed_[static_cast<std::size_t>(entry)];
            if (routed.touched) from_losses = &routed.grad;
          }
          layer.backward(ctx, *p, saved, xv, dy, targets[0].grad, targets[0].mode, from_losses);
        },
        any_trains(params));
    if constexpr (routes) {
      node& made = nodes_.back();
      made.routed = entry;
      routed_.back().wants_grad = made.wants_grad;
      return applied<T, B, routed_variable<T, B>>{result,
                                                  routed_variable<T, B>(this, entry, step_)};
    } else {
      return applied<T, B, layer_without_router>{result, {}};
    }
  }

  /// Applies a loss to what the routers of one or more layers did and gives its value as a [1, 1];
  /// its weight is that of weighted_sum. The loss is copied. It has
  ///   saved forward(ctx, std::span<const routed_view<T, B>>) const, with saved.value [1, 1];
  ///   void backward(ctx, layers, const saved&, dvalue, std::span<const routed_gradient<T, B>> out,
  ///                 grad_mode) const, which writes all of dlogits and dgates, and of dcontrol and
  ///                 dnoise where they are not empty.
  template <class Loss>
  variable_type apply_loss(const Loss& loss, std::initializer_list<routed_variable<T, B>> layers) {
    return apply_loss(loss, std::span<const routed_variable<T, B>>(layers.begin(), layers.size()));
  }
  template <class Loss>
  variable_type apply_loss(const Loss& loss, std::span<const routed_variable<T, B>> layers) {
    const std::span<index> entries = host_array<index>(layers.size());
    const std::span<routed_view<T, B>> views = host_array<routed_view<T, B>>(layers.size());
    const std::span<routed_gradient<T, B>> out = host_array<routed_gradient<T, B>>(layers.size());
    bool wants = false, repeated = false;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const routed_entry& entry = at("tape::apply_loss", "layers", layers[i]);
      entries[i] = layers[i].entry_;
      views[i] = entry.view;
      wants = wants || entry.wants_grad;
      for (std::size_t j = 0; j < i; ++j) repeated = repeated || entries[j] == entries[i];
    }
    const std::span<const routed_view<T, B>> in = views;
    const auto saved = loss.forward(ctx_, in);
    using saved_type = std::remove_cv_t<decltype(saved)>;
    static_assert(
        std::is_trivially_destructible_v<saved_type> && std::is_trivially_destructible_v<Loss>,
        "talpa: tape::apply_loss keeps the loss and what forward saves in an arena, both "
        "must be trivially destructible: views, not owners (docs/autograd.md)");
    check_shape("tape::apply_loss", "saved.value", saved.value, 1, 1, "one number");
    return record(
        saved.value, {},
        [this, loss, saved, in, entries, out, repeated](
            context<B>& ctx, matrix_view<const T, B> dvalue, std::span<const target_type>) {
          const grad_mode out_mode = open_routed(entries, repeated);
          for (std::size_t i = 0; i < out.size(); ++i) out[i] = entry_of(entries[i]).grad;
          loss.backward(ctx, in, saved, dvalue, std::span<const routed_gradient<T, B>>(out),
                        out_mode);
        },
        wants);
  }

  // ---- nodes of the user's own -----------------------------------------------------------------

  /// Uninitialised [rows, cols] that lives until reset, for the value of a node.
  matrix_view<T, B> make(index rows, index cols) {
    return ctx_.memory.template take<T>(rows, cols);
  }

  /// Records a node: `y` is its value and lives until reset, `backward(ctx, dy, targets)` writes
  /// the gradient of inputs[i] as targets[i] says, one after the other (two may share memory, then
  /// the second adds), and adds to gradients of its own parameters. `backward` is copied into an
  /// arena and must be trivially destructible. `has_parameters`: something other than the inputs
  /// wants a gradient. See autograd/function.hpp for a pair of free functions.
  template <class Backward>
  variable_type record(input<T, B> y, std::initializer_list<variable_type> inputs,
                       const Backward& backward, bool has_parameters = false) {
    return record(y, std::span<const variable_type>(inputs.begin(), inputs.size()), backward,
                  has_parameters);
  }
  template <class Backward>
  variable_type record(input<T, B> y, std::span<const variable_type> inputs,
                       const Backward& backward, bool has_parameters = false) {
    static_assert(std::is_trivially_destructible_v<Backward>,
                  "talpa: tape::record keeps the backward function in an arena, what it captures "
                  "must be trivially destructible: views, not owners (docs/autograd.md)");
    using frame_type = frame<Backward>;
    static_assert(alignof(frame_type) <= detail::host_alignment);
    bool wants = has_parameters;
    for (const variable_type& v : inputs) {
      wants = at("tape::record", "inputs", v).wants_grad || wants;
    }
    const variable_type result = add_node(y, wants);
    if (!wants) return result;
    const std::span<index> sources = host_array<index>(inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) sources[i] = inputs[i].node_;
    const std::span<target_type> targets = host_array<target_type>(inputs.size());
    node& made = nodes_.back();
    made.frame = std::construct_at(host_.template take<frame_type>(1).data,
                                   frame_type{sources, targets, backward});
    made.run = &frame_type::run;
    return result;
  }

  /// The value of v; errors name `function` and `argument`.
  matrix_view<const T, B> value_of(const char* function, const char* argument,
                                   const variable_type& v) {
    return at(function, argument, v).value;
  }

  // ---- running ---------------------------------------------------------------------------------

  /// Gradients of a [1, 1] with respect to everything it depends on. May be called again: gradients
  /// of variables are then written anew, those of parameters added to once more.
  void backward(const variable_type& loss) {
    check_shape("tape::backward", "loss", at("tape::backward", "loss", loss).value, 1, 1,
                "one number, or give dy");
    check_wanted("loss", loss);
    forget_gradients();
    ops::fill(ctx_, T{1}, target(loss.node_).grad);
    run_from(loss.node_);
  }
  /// The same from a gradient dy of y, of its shape.
  void backward(const variable_type& y, input<T, B> dy) {
    const matrix_view<const T, B> yv = at("tape::backward", "y", y).value;
    check_shape("tape::backward", "dy", dy, yv.rows, yv.cols, "shape of y");
    check_wanted("y", y);
    forget_gradients();
    ops::copy(ctx_, dy, target(y.node_).grad);
    run_from(y.node_);
  }

  /// Forgets everything recorded and hands its memory back; handles made before become invalid.
  void reset() {
    nodes_.clear();
    routed_.clear();
    host_.rewind({});
    ctx_.memory.rewind(start_);
    ++step_;
  }

  /// Number of variables since the last reset.
  index size() const { return static_cast<index>(nodes_.size()); }

 private:
  friend class variable<T, B>;
  friend class routed_variable<T, B>;

  struct node {
    matrix_view<const T, B> value;
    matrix_view<T, B> grad{};                   // taken when the first gradient arrives
    void (*run)(tape&, const node&) = nullptr;  // null: nothing to do backwards
    void* frame = nullptr;                      // what run reads
    index routed = -1;                          // entry of an applied layer
    bool wants_grad = false;
    bool touched = false;  // grad was written in this backward
  };

  struct routed_entry {
    routed_view<T, B> view;
    routed_gradient<T, B> grad{};  // taken when the first loss arrives
    bool wants_grad = false;
    bool touched = false;
  };

  template <class Backward>
  struct frame {
    std::span<const index> inputs;
    std::span<target_type> targets;
    Backward backward;

    static void run(tape& t, const node& n) {
      frame& self = *static_cast<frame*>(n.frame);
      for (std::size_t i = 0; i < self.inputs.size(); ++i) {
        self.targets[i] = t.target(self.inputs[i]);
      }
      self.backward(t.ctx_, matrix_view<const T, B>(n.grad),
                    std::span<const target_type>(self.targets));
    }
  };

  variable_type linear_with(const variable_type& x, parameter<T, B>& weight,
                            parameter<T, B>* bias) {
    const matrix_view<const T, B> xv = at("tape::linear", "x", x).value;
    const matrix_view<const T, B> w = weight.value();
    check_shape("tape::linear", "weight", w, w.rows, xv.cols, "outputs, columns of x");
    if (bias != nullptr) {
      check_shape("tape::linear", "bias", bias->value(), 1, w.rows, "one row, rows of weight");
    }
    const matrix_view<T, B> y = make(xv.rows, w.rows);
    ops::gemm(ctx_, xv, transpose::no, w, transpose::yes, T{0}, y);
    if (bias != nullptr) ops::add_bias(ctx_, y, bias->value(), y);
    return record(
        y, {x},
        [xv, wp = &weight, bias](context<B>& ctx, matrix_view<const T, B> dy,
                                 std::span<const target_type> targets) {
          add_gradient(ctx, *wp, dy, xv);
          if (bias != nullptr && bias->trainable()) {
            ops::column_sum(ctx, dy, T{1}, bias->grad());
          }
          input_gradient(ctx, *wp, dy, targets[0].grad, targets[0].mode);
        },
        weight.trainable() || (bias != nullptr && bias->trainable()));
  }

  static grad_mode added_if(bool trains) {
    return trains ? grad_mode::accumulate : grad_mode::ignore;
  }

  /// dx = factor dy, as the target says.
  static void pass(context<B>& ctx, T factor, matrix_view<const T, B> dy, const target_type& dx) {
    if (dx.mode == grad_mode::overwrite) {
      ops::scale(ctx, factor, dy, dx.grad);
    } else if (dx.mode == grad_mode::accumulate) {
      ops::axpy(ctx, factor, dy, dx.grad);
    }
  }

  template <class Params>
  static bool any_trains(Params& params) {
    if constexpr (requires { params.visit([](parameter<T, B>&) {}); }) {
      bool any = false;
      params.visit([&](parameter<T, B>& p) { any = any || p.trainable(); });
      return any;
    } else {
      return true;
    }
  }

  /// n value-initialised objects in the arena of the closures.
  template <class Element>
  std::span<Element> host_array(std::size_t n) {
    static_assert(std::is_trivially_destructible_v<Element>);
    static_assert(alignof(Element) <= detail::host_alignment);
    Element* const first = host_.template take<Element>(static_cast<index>(n)).data;
    std::uninitialized_value_construct_n(first, n);
    return {first, n};
  }

  variable_type add_node(matrix_view<const T, B> value, bool wants_grad) {
    nodes_.push_back({});
    nodes_.back().value = value;
    nodes_.back().wants_grad = wants_grad;
    return variable_type(this, size() - 1, step_);
  }

  node& at(const char* function, const char* argument, const variable_type& v) {
    check_handle(function, argument, v.owner_, v.step_);
    return nodes_[static_cast<std::size_t>(v.node_)];
  }
  routed_entry& at(const char* function, const char* argument, const routed_variable<T, B>& v) {
    check_handle(function, argument, v.owner_, v.step_);
    return entry_of(v.entry_);
  }
  routed_entry& entry_of(index entry) { return routed_[static_cast<std::size_t>(entry)]; }

  void check_handle(const char* function, const char* argument, const tape* owner,
                    index step) const {
    if (owner == this && step == step_) return;
    detail::throw_value(function, argument,
                        owner == nullptr ? "an empty handle"
                        : owner != this  ? "a handle of another tape"
                                         : "a handle from before reset",
                        "a handle that this tape made since its last reset");
  }

  void check_wanted(const char* argument, const variable_type& v) {
    if (at("tape::backward", argument, v).wants_grad) return;
    detail::throw_value("tape::backward", argument, "a constant",
                        "a variable that depends on a leaf or on a parameter that trains");
  }

  /// Where the next gradient of a node goes; counts as written.
  target_type target(index i) {
    node& n = nodes_[static_cast<std::size_t>(i)];
    if (!n.wants_grad) return {};
    if (n.grad.data == nullptr) n.grad = make(n.value.rows, n.value.cols);
    const grad_mode m = n.touched ? grad_mode::accumulate : grad_mode::overwrite;
    n.touched = true;
    return {n.grad, m};
  }

  /// How a loss writes to all of these entries at once: overwrite if it is the first for each of
  /// them, else accumulate on what was there or on zeros.
  grad_mode open_routed(std::span<const index> entries, bool repeated) {
    bool accumulate = repeated;
    for (const index e : entries) {
      routed_entry& entry = entry_of(e);
      if (entry.grad.dlogits.data == nullptr) {
        const index rows = entry.view.logits.rows, cols = entry.view.logits.cols;
        entry.grad.dlogits = make(rows, cols);                                 // [N, E]
        entry.grad.dgates = make(rows, cols);                                  // [N, E]
        if (!entry.view.control.empty()) entry.grad.dcontrol = make(rows, 1);  // [N, 1]
        if (!entry.view.noise.deviation.empty()) {
          entry.grad.dnoise = {make(rows, cols), make(rows, cols)};  // [N, E], [N, E]
        }
      }
      accumulate = accumulate || entry.touched;
    }
    for (const index e : entries) {
      routed_entry& entry = entry_of(e);
      if (accumulate && !entry.touched) {
        ops::fill(ctx_, T{0}, entry.grad.dlogits);
        ops::fill(ctx_, T{0}, entry.grad.dgates);
        if (!entry.grad.dcontrol.empty()) ops::fill(ctx_, T{0}, entry.grad.dcontrol);
        if (!entry.grad.dnoise.dclean.empty()) {
          ops::fill(ctx_, T{0}, entry.grad.dnoise.dclean);
          ops::fill(ctx_, T{0}, entry.grad.dnoise.ddeviation);
        }
      }
      entry.touched = true;
    }
    return accumulate ? grad_mode::accumulate : grad_mode::overwrite;
  }

  void forget_gradients() {
    for (node& n : nodes_) n.touched = false;
    for (routed_entry& entry : routed_) entry.touched = false;
  }

  void run_from(index last) {
    for (index i = last; i >= 0; --i) {
      const node& n = nodes_[static_cast<std::size_t>(i)];
      if (n.run == nullptr) continue;
      const bool lost = n.routed >= 0 && entry_of(n.routed).touched;
      if (!n.touched && !lost) continue;
      // A layer that only a loss on its routing depends on.
      if (!n.touched) ops::fill(ctx_, T{0}, target(i).grad);
      n.run(*this, n);
    }
  }

  matrix_view<const T, B> gradient_of(const variable_type& v) {
    node& n = at("variable::grad", "variable", v);
    if (!n.wants_grad) {
      detail::throw_value("variable::grad", "variable", "a constant",
                          "a variable that depends on a leaf or on a parameter that trains");
    }
    if (!n.touched) ops::fill(ctx_, T{0}, target(v.node_).grad);
    return n.grad;
  }

  context<B>& ctx_;
  typename workspace<B>::mark start_;
  workspace<cpu> host_;
  std::vector<node> nodes_;
  std::vector<routed_entry> routed_;
  index step_ = 0;
};

namespace detail {

template <class Tape>
Tape& owner_of(const char* function, Tape* owner) {
  if (owner == nullptr) {
    throw_value(function, "variable", "an empty handle", "one that a tape made");
  }
  return *owner;
}

}  // namespace detail

template <floating T, backend B>
matrix_view<const T, B> variable<T, B>::value() const {
  return detail::owner_of("variable::value", owner_).at("variable::value", "variable", *this).value;
}

template <floating T, backend B>
matrix_view<const T, B> variable<T, B>::grad() const {
  return detail::owner_of("variable::grad", owner_).gradient_of(*this);
}

template <floating T, backend B>
bool variable<T, B>::wants_grad() const {
  return detail::owner_of("variable::wants_grad", owner_)
      .at("variable::wants_grad", "variable", *this)
      .wants_grad;
}

template <floating T, backend B>
routed_view<T, B> routed_variable<T, B>::view() const {
  return detail::owner_of("routed_variable::view", owner_)
      .at("routed_variable::view", "variable", *this)
      .view;
}

}  // namespace talpa
