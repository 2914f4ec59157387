// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/token_pack.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/explain.hpp>
#include <talpa/testing/lanes.hpp>
#include <talpa/testing/sim.hpp>

#include <array>
#include <cstdint>
#include <type_traits>

// A selector behind virtual functions: what the laws do to it is compiled once, not for each.

namespace talpa::testing::detail {

/// Lane groups that must give the bits of the CPU's loop over rows.
enum class lane_group { serial, token_pack, sim_4, sim_8, sim_32 };

/// Those that the laws for T run. A selector is one template of scalar and group, so the simulated
/// widths are shared out: laws for float and for double have seen all.
template <floating T>
inline constexpr std::array lane_groups{lane_group::serial, lane_group::token_pack,
                                        lane_group::sim_8};
template <>
inline constexpr std::array lane_groups<float>{lane_group::serial, lane_group::token_pack,
                                               lane_group::sim_4, lane_group::sim_32};

inline const char* name_of(lane_group g) {
  constexpr const char* names[] = {"serial", "token_pack", "sim<4>", "sim<8>", "sim<32>"};
  return names[static_cast<int>(g)];
}

/// What does not depend on the scalar.
struct selector_facts {
  bool unit_mass = false;
  bool coupled = false;     ///< coupled_selector
  bool controlled = false;  ///< controlled_selector
  bool biased = false;      ///< biased_selector
  index max_selected = 0;   ///< for the experts of the trial
};

/// The functions of ops/select.hpp.
template <floating T>
class selector_ops {
 public:
  using padding = vector_view<const std::uint8_t, cpu>;
  using inputs = select_inputs<T, cpu>;

  virtual ~selector_ops() = default;
  virtual void select(context<cpu>& ctx, input<T, cpu> logits, padding real, output<T, cpu> gates,
                      matrix_view<std::uint32_t, cpu> mask, const inputs& more) const = 0;
  virtual void replay(context<cpu>& ctx, input<T, cpu> logits, padding real,
                      matrix_view<std::uint32_t, cpu> mask, output<T, cpu> gates,
                      const inputs& more) const = 0;
  virtual void select_backward(context<cpu>& ctx, input<T, cpu> logits, input<T, cpu> gates,
                               matrix_view<const std::uint32_t, cpu> mask, input<T, cpu> dgates,
                               output<T, cpu> dlogits, const inputs& more,
                               output<T, cpu> dcontrol) const = 0;
};

/// The functions of testing/lanes.hpp. A selector that couples rows has no select_on.
template <floating T>
class selector_lanes {
 public:
  using inputs = select_inputs<T, cpu>;

  virtual ~selector_lanes() = default;
  virtual routing<T, cpu> select_on(lane_group g, const matrix<T, cpu>& logits,
                                    const inputs& more) const = 0;
  virtual matrix<T, cpu> replay_on(lane_group g, const matrix<T, cpu>& logits,
                                   const matrix<std::uint32_t, cpu>& mask,
                                   const inputs& more) const = 0;
  virtual selection_gradient<T> select_backward_on(lane_group g, const matrix<T, cpu>& logits,
                                                   const routing<T, cpu>& r,
                                                   const matrix<T, cpu>& dgates,
                                                   const inputs& more) const = 0;
};

template <floating T, class Selector>
class selector_ops_model final : public selector_ops<T> {
 public:
  using typename selector_ops<T>::padding;
  using typename selector_ops<T>::inputs;

  explicit selector_ops_model(const Selector& selector) : selector_(selector) {}

  void select(context<cpu>& ctx, input<T, cpu> logits, padding real, output<T, cpu> gates,
              matrix_view<std::uint32_t, cpu> mask, const inputs& more) const override {
    ops::select(ctx, selector_, logits, real, gates, mask, more);
  }
  void replay(context<cpu>& ctx, input<T, cpu> logits, padding real,
              matrix_view<std::uint32_t, cpu> mask, output<T, cpu> gates,
              const inputs& more) const override {
    ops::replay(ctx, selector_, logits, real, mask, gates, more);
  }
  void select_backward(context<cpu>& ctx, input<T, cpu> logits, input<T, cpu> gates,
                       matrix_view<const std::uint32_t, cpu> mask, input<T, cpu> dgates,
                       output<T, cpu> dlogits, const inputs& more,
                       output<T, cpu> dcontrol) const override {
    ops::select_backward(ctx, selector_, logits, gates, mask, dgates, dlogits, more, dcontrol);
  }

 private:
  Selector selector_;
};

template <floating T, class Selector>
class selector_lanes_model final : public selector_lanes<T> {
 public:
  using typename selector_lanes<T>::inputs;

  explicit selector_lanes_model(const Selector& selector) : selector_(selector) {}

  routing<T, cpu> select_on(lane_group g, const matrix<T, cpu>& logits,
                            const inputs& more) const override {
    if constexpr (coupled_selector<Selector>) {
      return {};
    } else {
      return on(
          g, [&]<class G>(lane_type<G>) { return testing::select_on<G>(selector_, logits, more); });
    }
  }
  matrix<T, cpu> replay_on(lane_group g, const matrix<T, cpu>& logits,
                           const matrix<std::uint32_t, cpu>& mask,
                           const inputs& more) const override {
    return on(g, [&]<class G>(lane_type<G>) {
      return testing::replay_on<G>(selector_, logits, mask, more);
    });
  }
  selection_gradient<T> select_backward_on(lane_group g, const matrix<T, cpu>& logits,
                                           const routing<T, cpu>& r, const matrix<T, cpu>& dgates,
                                           const inputs& more) const override {
    return on(g, [&]<class G>(lane_type<G>) {
      return testing::select_backward_on<G>(selector_, logits, r, dgates, more);
    });
  }

 private:
  template <class G>
  struct lane_type {};
  template <class F>
  static auto on(lane_group g, F f) {
    if (g == lane_group::token_pack) {
      // The width that the CPU's loop over rows takes; a width of one register is as good as any.
      return f(lane_type<token_pack<talpa::detail::packed_tokens<T>>>{});
    }
    if constexpr (std::is_same_v<T, float>) {
      if (g == lane_group::sim_4) return f(lane_type<sim<4>>{});
      if (g == lane_group::sim_32) return f(lane_type<sim<32>>{});
    } else {
      if (g == lane_group::sim_8) return f(lane_type<sim<8>>{});
    }
    return f(lane_type<serial>{});
  }

  Selector selector_;
};

}  // namespace talpa::testing::detail
