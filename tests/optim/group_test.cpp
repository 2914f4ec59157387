// SPDX-License-Identifier: Apache-2.0
#include <talpa/cpu/fill.hpp>
#include <talpa/optim/group.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <string>
#include <vector>

namespace talpa::group_test {

namespace {

using param = parameter<float, cpu>;
using group = parameter_group<float, cpu>;
using set = parameter_set<float, cpu>;

param make(const char* name, index rows = 2) { return {name, matrix<float, cpu>(rows, 3)}; }

struct layer_params {
  param weight = make("weight");
  param bias = make("bias", 1);
  template <class F>
  void visit(F f) {
    f(weight);
    f(bias);
  }
};

}  // namespace

TEST_SUITE("optim/group") {
  TEST_CASE("a group collects single parameters and whole layers in their order") {
    param extra = make("extra");
    layer_params layer;
    group g{.name = "all"};
    g.add(extra).add(layer);
    REQUIRE(g.parameters.size() == 3);
    CHECK(g.parameters[0] == &extra);
    CHECK(g.parameters[1] == &layer.weight);
    CHECK(g.parameters[2] == &layer.bias);
  }

  TEST_CASE("a set keeps parameters in order with their groups and trained rows") {
    param a = make("a", 4), b = make("b"), frozen = make("frozen");
    a.train_blocks(1, std::vector<index>{0, 3});
    frozen.freeze();
    set s("optimiser", {{.name = "one", .parameters = {&a, &frozen}, .learning_rate = 0.5},
                        {.name = "two", .parameters = {&b}, .weight_decay = 0.25}});
    REQUIRE(s.parameters().size() == 3);
    CHECK(s.parameters()[2] == &b);
    REQUIRE(s.entries().size() == 3);
    CHECK(s.entries()[0].runs.size() == 2);
    CHECK(s.entries()[1].runs.empty());
    CHECK(s.group_of(s.entries()[1]).learning_rate == 0.5);
    CHECK(s.group_of(s.entries()[2]).weight_decay == 0.25);
    CHECK(s.find("optimiser", b) == 2);
    s.check_unchanged("optimiser::step");
    // Freezing and training again is the same trainability.
    b.freeze();
    b.train();
    s.check_unchanged("optimiser::step");
  }

  TEST_CASE("zero_grad clears every gradient") {
    context<cpu> ctx(1);
    param a = make("a"), b = make("b");
    set s("optimiser", {{.name = "one", .parameters = {&a}}, {.name = "two", .parameters = {&b}}});
    a.grad()(1, 2) = 5.0f;
    b.grad()(0, 0) = 5.0f;
    s.zero_grad(ctx);
    CHECK(a.grad()(1, 2) == 0.0f);
    CHECK(b.grad()(0, 0) == 0.0f);
  }

  TEST_CASE("a set names the parameter that stands in two places") {
    param a = make("layer.a"), b = make("b");
    CHECK_THROWS_WITH_AS(set("adamw", {{.name = "head", .parameters = {&a, &b}},
                                       {.name = "adapters", .parameters = {&a}}}),
                         "talpa::adamw: 'layer.a' is in groups head and adapters, expected each "
                         "parameter in one place of one group",
                         value_error);
    CHECK_THROWS_WITH_AS(set("adamw", {{.name = "head", .parameters = {&b, &b}}}),
                         "talpa::adamw: 'b' is in groups head and head, expected each parameter in "
                         "one place of one group",
                         value_error);
  }

  TEST_CASE("a set names groups that cannot be trained") {
    param frozen = make("frozen"), a = make("a");
    frozen.freeze();
    CHECK_THROWS_WITH_AS(set("sgd", {{.name = "base", .parameters = {&frozen}}, {.name = "empty"}}),
                         "talpa::sgd: 'groups' is [base, empty] in which nothing trains, expected "
                         "at least one parameter that trains",
                         value_error);
    CHECK_THROWS_WITH_AS(set("sgd", {{.name = "odd", .parameters = {nullptr}}}),
                         "talpa::sgd: 'parameters' is null, expected a parameter in group odd",
                         value_error);
    CHECK_THROWS_WITH_AS(set("sgd", {{.name = "odd", .parameters = {&a}, .learning_rate = -0.5}}),
                         "talpa::sgd: 'learning_rate' is -0.5, expected a finite number >= 0 in "
                         "group odd",
                         value_error);
    CHECK_THROWS_WITH_AS(
        set("sgd", {{.name = "odd",
                     .parameters = {&a},
                     .weight_decay = std::numeric_limits<double>::infinity()}}),
        "talpa::sgd: 'weight_decay' is inf, expected a finite number >= 0 in group odd",
        value_error);
    CHECK_THROWS_AS(set("sgd", {{.name = "odd",
                                 .parameters = {&a},
                                 .learning_rate = std::numeric_limits<double>::quiet_NaN()}}),
                    value_error);
  }

  TEST_CASE("a set names the parameter whose trained rows changed") {
    param a = make("layer.a", 4);
    a.train_blocks(1, std::vector<index>{0, 2, 3});
    set s("sgd", {{.name = "one", .parameters = {&a}}});
    a.train_blocks(1, std::vector<index>{0, 1, 3});
    CHECK_THROWS_WITH_AS(s.check_unchanged("sgd::step"),
                         "talpa::sgd::step: 'layer.a' is trained in rows [0, 2) and [3, 4), "
                         "expected [0, 1) and [2, 4) = rows that trained when the optimiser was "
                         "made; make a new one after freeze, train or train_blocks",
                         value_error);
    a.freeze();
    CHECK_THROWS_WITH_AS(s.check_unchanged("sgd::step"),
                         "talpa::sgd::step: 'layer.a' is trained in rows none, expected [0, 1) and "
                         "[2, 4) = rows that trained when the optimiser was made; make a new one "
                         "after freeze, train or train_blocks",
                         value_error);
    param stranger = make("stranger");
    CHECK_THROWS_WITH_AS(
        s.find("sgd::velocity", stranger),
        "talpa::sgd::velocity: 'stranger' is in no group, expected a parameter of this optimiser",
        value_error);
  }
}

}  // namespace talpa::group_test
