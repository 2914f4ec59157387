// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"

#include <talpa/analysis/completion_labels.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace talpa::completion_labels_test {

using namespace support;

namespace {

using token_list = std::vector<std::int32_t>;

token_list labels_of(const completion_labels& by, index sequences, const token_list& tokens) {
  const index length = sequences > 0 ? static_cast<index>(tokens.size()) / sequences : 3;
  const matrix_view<const std::int32_t, cpu> view(tokens.data(), sequences, length);
  const vector<std::int32_t, cpu> labels = by(view);
  return {labels.data(), labels.data() + labels.size()};
}

}  // namespace

TEST_SUITE("analysis/completion_labels") {
  const token_list end{1, 2};

  TEST_CASE("what is learnt, by hand") {
    const completion_labels by{end, 9};
    const std::int32_t no = ignore_label;
    CHECK(labels_of(by, 1, {5, 1, 2, 3, 4, 6}) == token_list{no, no, 3, 4, 9, no});
    // The last occurrence counts, and sequences are apart.
    CHECK(labels_of(by, 2, {1, 2, 5, 1, 2, 7, 8, /**/ 1, 2, 3, 3, 3, 3, 3}) ==
          token_list{no, no, no, no, 7, 9, no, no, 3, 3, 3, 3, 9, no});
    // Without one, or where it ends the sequence, the end of the text is all there is.
    CHECK(labels_of(by, 1, {2, 1, 7, 1}) == token_list{no, no, 9, no});
    CHECK(labels_of(by, 1, {7, 7, 1, 2}) == token_list{no, no, 9, no});
    CHECK(labels_of(by, 1, {7}) == token_list{no});
    CHECK(labels_of(by, 1, {2}) == token_list{no});
    CHECK(labels_of(by, 0, {}).empty());
  }

  TEST_CASE("agrees with masking in place as the original does") {
    test_random random(71);
    const completion_labels by{end, 3};
    for (int repeat = 0; repeat < 2000; ++repeat) {
      const std::size_t length = 1 + static_cast<std::size_t>(random.below(8));
      token_list tokens, masked;
      for (std::size_t t = 0; t < length; ++t) {
        tokens.push_back(static_cast<std::int32_t>(random.below(4)));
      }
      masked = tokens;
      const auto last = std::find_end(tokens.begin(), tokens.end(), end.begin(), end.end());
      const auto until = last == tokens.end() ? length : (last - tokens.begin()) + end.size();
      std::fill_n(masked.begin(), until, ignore_label);
      masked.back() = 3;
      masked.erase(masked.begin());
      masked.push_back(ignore_label);
      CHECK(labels_of(by, 1, tokens) == masked);
    }
  }

  TEST_CASE("tokens that are none are refused") {
    CHECK_THROWS_WITH_AS(labels_of({{}, 9}, 1, {1}),
                         "talpa::completion_labels: 'end_of_prompt' is 0, expected >= 1 = tokens "
                         "that end the prompt",
                         value_error);
    CHECK_THROWS_WITH_AS(labels_of({end, -1}, 1, {1}),
                         "talpa::completion_labels: 'end_of_text' is -1, expected >= 0 = a token",
                         value_error);
    CHECK_THROWS_WITH_AS(labels_of({end, 9}, 1, {1, -100}),
                         "talpa::completion_labels: 'tokens' is -100, expected >= 0 = a token",
                         value_error);
    const token_list bad{-5};
    CHECK_THROWS_WITH_AS(labels_of({bad, 9}, 1, {1}),
                         "talpa::completion_labels: 'end_of_prompt' is -5, expected >= 0 = a token",
                         value_error);
  }
}

}  // namespace talpa::completion_labels_test
