// SPDX-License-Identifier: Apache-2.0
#include <talpa/analysis/neuron_split.hpp>
#include <talpa/core/error.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace talpa::neuron_split_test {

TEST_SUITE("analysis/neuron_split") {
  TEST_CASE("blocks of neighbours, and an order that is given") {
    const neuron_split blocks = contiguous_split(6, 3);
    CHECK(blocks.order == std::vector<index>{0, 1, 2, 3, 4, 5});
    CHECK(blocks.hidden == 2);
    CHECK(blocks.neurons() == 6);
    CHECK(blocks.experts() == 3);
    const neuron_split given = given_split({3, 0, 2, 1}, 2);
    CHECK(given.order == std::vector<index>{3, 0, 2, 1});
    CHECK(given.hidden == 2);
    CHECK(given.shared == 0);
    CHECK(given_split({1, 0}, 1).experts() == 1);
    CHECK(neuron_split{}.experts() == 0);
  }

  TEST_CASE("neurons that do not divide, and an order that is no permutation, are refused") {
    CHECK_THROWS_WITH_AS(contiguous_split(8, 3),
                         "talpa::contiguous_split: 'experts' is 3, expected a divisor of 8 = "
                         "neurons of the dense network",
                         value_error);
    CHECK_THROWS_WITH_AS(
        contiguous_split(8, 0),
        "talpa::contiguous_split: 'experts' is 0, expected >= 1 = at least one expert",
        value_error);
    CHECK_THROWS_WITH_AS(contiguous_split(0, 1),
                         "talpa::contiguous_split: 'experts' is 1, expected a divisor of 0 = "
                         "neurons of the dense network",
                         value_error);
    CHECK_THROWS_WITH_AS(given_split({0, 1, 2}, 2),
                         "talpa::given_split: 'experts' is 2, expected a divisor of 3 = neurons of "
                         "the dense network",
                         value_error);
    CHECK_THROWS_WITH_AS(given_split({0, 1, 4, 2}, 2),
                         "talpa::given_split: 'order' is 4, expected 0..3 = neurons of the dense "
                         "network",
                         value_error);
    CHECK_THROWS_WITH_AS(given_split({0, -1, 3, 2}, 2),
                         "talpa::given_split: 'order' is -1, expected 0..3 = neurons of the dense "
                         "network",
                         value_error);
    CHECK_THROWS_WITH_AS(given_split({0, 1, 2, 1}, 2),
                         "talpa::given_split: 'order' is 1 twice, expected each neuron once",
                         value_error);
  }
}

}  // namespace talpa::neuron_split_test
