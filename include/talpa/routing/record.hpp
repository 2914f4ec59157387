// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/routing/routing.hpp>

#include <cstdio>
#include <string>
#include <type_traits>

namespace talpa {

/// Copies a routing out of a forward, to keep beyond the step, compare or replay.
template <class T, backend B>
routing<std::remove_const_t<T>, B> record(const routing_view<T, B>& view) {
  return routing<std::remove_const_t<T>, B>(routing_view<const std::remove_const_t<T>, B>(view));
}

/// A batch that will use the experts of `recorded` instead of selecting: gates are computed anew
/// from the logits over the same mask. `recorded` must outlive every call with the batch.
template <class T, backend B>
batch_info<T, B> replay(batch_info<T, B> batch, const routing<T, B>& recorded) {
  batch.replay = recorded.mask.view();
  return batch;
}
/// A temporary recording would be gone before the call.
template <class T, backend B>
batch_info<T, B> replay(batch_info<T, B> batch, routing<T, B>&& recorded) = delete;

/// A small routing as a table: one line a token with its gates, `.` where an expert is off. Tokens
/// beyond the first `max_tokens` are counted, not shown.
template <class T>
std::string to_text(const routing_view<T, cpu>& view, index max_tokens = 32) {
  char cell[40];
  std::string s;
  const auto add = [&](int) { s += cell; };
  add(std::snprintf(cell, sizeof cell, "%6s", "token"));
  for (index e = 0; e < view.experts(); ++e) add(std::snprintf(cell, sizeof cell, " %7td", e));
  s += '\n';
  const index shown = view.tokens() < max_tokens ? view.tokens() : max_tokens;
  for (index n = 0; n < shown; ++n) {
    add(std::snprintf(cell, sizeof cell, "%6td", n));
    for (index e = 0; e < view.experts(); ++e) {
      if (view.on(n, e)) {
        add(std::snprintf(cell, sizeof cell, " %7.4f", static_cast<double>(view.gates(n, e))));
      } else {
        add(std::snprintf(cell, sizeof cell, " %7s", "."));
      }
    }
    s += '\n';
  }
  if (shown < view.tokens()) {
    add(std::snprintf(cell, sizeof cell, "and %td more\n", view.tokens() - shown));
  }
  return s;
}

}  // namespace talpa
