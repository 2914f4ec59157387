// SPDX-License-Identifier: Apache-2.0
#include <talpa/layers/allocation.hpp>

#include <doctest/doctest.h>

#include <numeric>
#include <vector>

namespace talpa::allocation_test {

namespace {

using numbers = std::vector<index>;

index sum(const numbers& all) { return std::accumulate(all.begin(), all.end(), index{0}); }

/// Four quarters of `length` layers each.
numbers quarters(index length, index a, index b, index c, index d) {
  numbers all;
  for (const index v : {a, b, c, d}) all.insert(all.end(), static_cast<std::size_t>(length), v);
  return all;
}

}  // namespace

TEST_SUITE("layers/allocation") {
  TEST_CASE("the shapes of MoLA over 32 layers have 160 experts each") {
    CHECK(allocation::triangle(32) == quarters(8, 8, 6, 4, 2));
    CHECK(allocation::inverted_triangle(32) == quarters(8, 2, 4, 6, 8));
    CHECK(allocation::hourglass(32) == quarters(8, 8, 2, 2, 8));
    CHECK(allocation::diamond(32) == quarters(8, 2, 8, 8, 2));
    CHECK(allocation::rectangle(32) == quarters(8, 5, 5, 5, 5));
    for (const numbers& all :
         {allocation::triangle(32), allocation::inverted_triangle(32), allocation::hourglass(32),
          allocation::diamond(32), allocation::rectangle(32)}) {
      CHECK(sum(all) == 160);
    }
    CHECK(sum(allocation::rectangle(32, 8)) == 256);
  }

  TEST_CASE("layers that four does not divide go to parts that differ by one") {
    CHECK(allocation::inverted_triangle(6) == numbers{2, 2, 4, 6, 6, 8});
    CHECK(allocation::triangle(6) == numbers{8, 6, 6, 4, 2, 2});
    CHECK(allocation::hourglass(4, 1, 3) == numbers{3, 1, 1, 3});
    CHECK(allocation::inverted_triangle(4, 1, 3) == numbers{1, 2, 2, 3});
    CHECK(allocation::inverted_triangle(4, 3, 3) == numbers{3, 3, 3, 3});
    CHECK(allocation::rectangle(1) == numbers{5});
    const index three[] = {1, 2, 4};
    CHECK(allocation::parts(5, three) == numbers{1, 1, 2, 2, 4});
  }

  TEST_CASE("lists of one's own and k") {
    CHECK(allocation::list(3, {4, 1, 9}) == numbers{4, 1, 9});
    CHECK(allocation::selected(2, allocation::list(3, {4, 1, 9})) == numbers{2, 1, 2});
  }

  TEST_CASE("what makes no sense is refused") {
    CHECK_THROWS_WITH_AS(
        allocation::triangle(3),
        "talpa::allocation::parts: 'layers' is 3, expected >= 4 = layers, one a part at least",
        value_error);
    CHECK_THROWS_WITH_AS(allocation::rectangle(3, 0),
                         "talpa::allocation::parts: 'values' is 0, expected >= 1 = experts of a "
                         "layer",
                         value_error);
    CHECK_THROWS_WITH_AS(allocation::hourglass(4, 9, 8),
                         "talpa::allocation::hourglass: 'few' is 9, expected 1..8 = 'many'",
                         value_error);
    CHECK_THROWS_WITH_AS(allocation::list(2, {1}),
                         "talpa::allocation::list: 'experts.size()' is 1, expected 2..2 = layers",
                         value_error);
    CHECK_THROWS_WITH_AS(
        allocation::list(1, {0}),
        "talpa::allocation::list: 'experts' is 0, expected >= 1 = experts of a layer", value_error);
    CHECK_THROWS_WITH_AS(allocation::selected(0, std::vector<index>{1}),
                         "talpa::allocation::selected: 'k' is 0, expected >= 1 = experts a token",
                         value_error);
    CHECK_THROWS_WITH_AS(
        allocation::parts(1, {}),
        "talpa::allocation::parts: 'values.size()' is 0, expected >= 1 = parts of a model",
        value_error);
  }
}

}  // namespace talpa::allocation_test
