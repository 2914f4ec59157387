// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>
#include <talpa/ops/select.hpp>

#include <concepts>

namespace talpa {

/// Has a name for errors and reports.
template <class S>
concept selector_has_name = requires {
  { S::name } -> std::convertible_to<const char*>;
};
/// `validate(E)` throws value_error when the hyperparameters do not fit E experts.
template <class S>
concept selector_has_validate = requires(const S s, index experts) {
  { s.validate(experts) } -> std::same_as<void>;
};
/// `max_selected(E)` bounds the number of experts of one token.
template <class S>
concept selector_has_max_selected = requires(const S s, index experts) {
  { s.max_selected(experts) } -> std::same_as<index>;
};
/// `S::unit_mass`: whether the gates of every token sum to one.
template <class S>
concept selector_has_unit_mass = requires {
  { S::unit_mass } -> std::convertible_to<bool>;
};
/// `select(group, row)` writes mask and gates of a row; or, where couples_rows is true,
/// `assign(ctx, batch, mask)` writes the masks of all rows.
template <class S>
concept selector_has_select = (!coupled_selector<S> &&
                               requires(const S s, const serial& g, const select_row<float>& row) {
                                 { s.select(g, row) } -> std::same_as<void>;
                               }) ||
                              (coupled_selector<S> &&
                               requires(const S s, context<cpu>& ctx,
                                        const assign_batch<float, cpu>& batch,
                                        matrix_view<std::uint32_t, cpu> mask) {
                                 { s.assign(ctx, batch, mask) } -> std::same_as<void>;
                               });
/// `replay(group, row)` writes the gates of a mask that is given.
template <class S>
concept selector_has_replay = requires(const S s, const serial& g, const select_row<float>& row) {
  { s.replay(g, row) } -> std::same_as<void>;
};
/// `select_backward(group, row)` writes dlogits.
template <class S>
concept selector_has_backward = requires(const S s, const serial& g,
                                         const select_gradient_row<float>& row) {
  { s.select_backward(g, row) } -> std::same_as<void>;
};

/// Turns rows of logits into gates and masks. Optional members: control and control_scorer,
/// has_bias, couples_rows, thread_registers, at(mode); see the concepts in ops/select.hpp.
template <class S>
concept selector_policy = selector_has_name<S> && selector_has_validate<S> &&
    selector_has_max_selected<S> && selector_has_unit_mass<S> && selector_has_select<S> &&
    selector_has_replay<S> && selector_has_backward<S>;

namespace detail {

/// The scorer of a selector's control, void without one.
template <class S>
struct control_scorer_type {
  using type = void;
};
template <controlled_selector S>
struct control_scorer_type<S> {
  using type = typename S::control_scorer;
};

}  // namespace detail

}  // namespace talpa
