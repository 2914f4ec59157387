// SPDX-License-Identifier: Apache-2.0
#include "layers/slow_mole.hpp"

#include <talpa/layers/adapter_banks.hpp>
#include <talpa/layers/linear.hpp>
#include <talpa/layers/lora_linear.hpp>

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

namespace talpa::adapter_banks_test {

namespace {

using mole = mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora>;

affine_params<float, cpu> make_base() {
  generator random(7);
  auto base = linear{}.init<float, cpu>(6, 5, random, "base.");
  base.freeze();
  return base;
}

}  // namespace

TEST_SUITE("layers/adapter_banks") {
  TEST_CASE("adapters share one base, and each call takes one of them or none") {
    const mole layer{.router = {.selector = {.k = 1}}, .expert = {.rank = 2}, .experts = 3};
    adapter_banks<mole, float, cpu> banks(make_base());
    generator random(1);
    auto& first = banks.add("first", layer, random);
    fill_normal(first.expert.b.value(), 1.0, random);
    fill_normal(banks.add("second", layer, random).expert.b.value(), 1.0, random);
    // Where the entries are does not depend on how many there are, nor on where the banks are.
    adapter_banks<mole, float, cpu> moved = std::move(banks);
    CHECK(&moved.at("first") == &first);
    CHECK(moved.names() == std::vector<std::string>{"first", "second"});
    CHECK(first.base.weight.value().data == moved.base().weight.value().data);
    CHECK(moved.at("second").base.weight.value().data == moved.base().weight.value().data);
    CHECK(first.expert.a.name() == "first.expert.A");
    CHECK_FALSE(first.base.weight.trainable());

    matrix<float, cpu> x(4, 6), a(4, 5), b(4, 5), none(4, 5), plain(4, 5);
    fill_normal(x.view(), 1.0, random);
    context<cpu> ctx(1);
    layer.forward(ctx, moved.at("first"), x, a.view(), mode::inference);
    layer.forward(ctx, moved.at("second"), x, b.view(), mode::inference);
    affine_forward(ctx, moved.base(), x, none.view());
    affine_forward(ctx, make_base(), x, plain.view());
    CHECK(testing::first_difference(none, plain) == "");
    CHECK(testing::first_difference(a, plain) != "");
    CHECK(testing::first_difference(a, b) != "");
    moved.remove("first");
    CHECK(moved.names() == std::vector<std::string>{"second"});
  }

  TEST_CASE("a change of the base is seen by every adapter") {
    const lora_linear layer{.adapter = {.rank = 2}};
    adapter_banks<lora_linear, float, cpu> banks(make_base());
    generator random(1);
    banks.add("only", layer, random);
    banks.base().weight.value()(0, 0) = 17.0F;
    CHECK(banks.at("only").base.weight.value()(0, 0) == 17.0F);
  }

  TEST_CASE("names that are empty, taken or unknown are refused, and nothing changes") {
    const lora_linear layer{.adapter = {.rank = 2}};
    adapter_banks<lora_linear, float, cpu> banks(make_base());
    generator random(1);
    CHECK_THROWS_WITH_AS(banks.at("x"),
                         "talpa::adapter_banks::at: 'name' is 'x', expected the name of an "
                         "adapter, of which there is none",
                         value_error);
    banks.add("a", layer, random);
    banks.add("b", layer, random);
    const generator before = random;
    CHECK_THROWS_WITH_AS(banks.add("a", layer, random),
                         "talpa::adapter_banks::add: 'name' is 'a', expected a name that is not "
                         "taken",
                         value_error);
    CHECK_THROWS_WITH_AS(banks.add("", layer, random),
                         "talpa::adapter_banks::add: 'name' is '', expected a name", value_error);
    CHECK_THROWS_WITH_AS(std::as_const(banks).at("c"),
                         "talpa::adapter_banks::at: 'name' is 'c', expected one of a, b = adapters",
                         value_error);
    CHECK_THROWS_WITH_AS(
        banks.remove("c"),
        "talpa::adapter_banks::remove: 'name' is 'c', expected one of a, b = adapters",
        value_error);
    CHECK(banks.names() == std::vector<std::string>{"a", "b"});
    CHECK(random == before);
  }
}

}  // namespace talpa::adapter_banks_test
