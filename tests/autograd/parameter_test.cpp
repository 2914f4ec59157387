// SPDX-License-Identifier: Apache-2.0
#include <talpa/autograd/parameter.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/packed_gemm.hpp>

#include <doctest/doctest.h>

#include <utility>
#include <vector>

namespace talpa::parameter_test {

namespace {

parameter<float, cpu> counted(index rows, index cols) {
  matrix<float, cpu> value(rows, cols);
  for (index i = 0; i < value.size(); ++i) value.data()[i] = static_cast<float>(i);
  return {"weight", std::move(value)};
}

}  // namespace

TEST_SUITE("autograd/parameter") {
  TEST_CASE("a parameter owns its value and trains all rows") {
    parameter<float, cpu> p = counted(3, 2);
    CHECK(p.name() == "weight");
    CHECK(p.exists());
    CHECK(p.rows() == 3);
    CHECK(p.cols() == 2);
    CHECK(p.size() == 6);
    CHECK(p.value()(2, 1) == 5.0f);
    CHECK(std::as_const(p).value()(2, 1) == 5.0f);
    CHECK(p.trainable());
    REQUIRE(p.trained().size() == 1);
    CHECK(p.trained()[0] == row_run{0, 3, 0});
    CHECK(p.trained_size() == 6);
    CHECK(p.grad().rows == 3);
    for (index i = 0; i < 6; ++i) CHECK(std::as_const(p).grad().data[i] == 0.0f);
    p.rename("layer.weight");
    CHECK(p.name() == "layer.weight");
  }

  TEST_CASE("a default-made parameter stands for none") {
    const parameter<double, cpu> p;
    CHECK(!p.exists());
    CHECK(!p.trainable());
    CHECK(p.size() == 0);
    CHECK(p.grad().data == nullptr);
  }

  TEST_CASE("a borrowed parameter shows foreign memory, frozen until train") {
    matrix<float, cpu> memory(2, 4);
    memory(1, 3) = 7.0f;
    auto p = parameter<float, cpu>::borrow("base", memory.view().col_range(2, 2));
    CHECK(p.exists());
    CHECK(!p.trainable());
    CHECK(p.grad().data == nullptr);
    CHECK(p.value()(1, 1) == 7.0f);
    p.value()(0, 0) = 3.0f;
    CHECK(memory(0, 2) == 3.0f);
    p.train();
    CHECK(p.trained_size() == 4);
  }

  TEST_CASE("freezing releases the gradient and training zeroes it") {
    parameter<float, cpu> p = counted(3, 2);
    p.grad()(1, 1) = 5.0f;
    p.freeze();
    CHECK(!p.trainable());
    CHECK(p.grad().data == nullptr);
    CHECK(p.trained_size() == 0);
    p.train();
    CHECK(p.grad()(1, 1) == 0.0f);
  }

  TEST_CASE("zero_grad clears the gradient, and nothing of a frozen parameter") {
    context<cpu> ctx(1);
    parameter<float, cpu> p = counted(3, 2);
    for (index i = 0; i < 6; ++i) p.grad().data[i] = 1.0f;
    p.zero_grad(ctx);
    for (index i = 0; i < 6; ++i) CHECK(p.grad().data[i] == 0.0f);
    CHECK(p.value()(2, 1) == 5.0f);
    p.freeze();
    p.zero_grad(ctx);
  }

  TEST_CASE("train_blocks keeps gradients of the chosen blocks only, neighbours joined") {
    parameter<float, cpu> p = counted(10, 3);
    // Blocks of two rows: 1 and 2 are one run, 4 another.
    p.train_blocks(2, std::vector<index>{4, 2, 1});
    REQUIRE(p.trained().size() == 2);
    CHECK(p.trained()[0] == row_run{2, 4, 0});
    CHECK(p.trained()[1] == row_run{8, 2, 4});
    CHECK(p.grad().rows == 6);
    CHECK(p.grad().cols == 3);
    CHECK(p.trained_size() == 18);
    p.train_blocks(2, std::vector<index>{});
    CHECK(!p.trainable());
    CHECK(p.trained_size() == 0);
    p.train_blocks(5, std::vector<index>{0, 1});
    REQUIRE(p.trained().size() == 1);
    CHECK(p.trained()[0] == row_run{0, 10, 0});
  }

  TEST_CASE("train_blocks names what is wrong and changes nothing then") {
    parameter<float, cpu> p = counted(6, 2);
    p.grad()(5, 1) = 9.0f;
    CHECK_THROWS_WITH_AS(p.train_blocks(0, std::vector<index>{0}),
                         "talpa::parameter::train_blocks: 'block_rows' is 0, expected >= 1 = rows "
                         "of one block",
                         value_error);
    CHECK_THROWS_WITH_AS(p.train_blocks(4, std::vector<index>{0}),
                         "talpa::parameter::train_blocks: 'block_rows' is 4, expected a divisor of "
                         "6 = rows of weight",
                         value_error);
    CHECK_THROWS_WITH_AS(p.train_blocks(2, std::vector<index>{3}),
                         "talpa::parameter::train_blocks: 'blocks' is 3, expected 0..2 = blocks of "
                         "the parameter",
                         value_error);
    CHECK_THROWS_WITH_AS(
        p.train_blocks(2, std::vector<index>{1, 1}),
        "talpa::parameter::train_blocks: 'blocks' is 1 twice, expected each block once",
        value_error);
    CHECK(p.trained_size() == 12);
    CHECK(p.grad()(5, 1) == 9.0f);
  }

  TEST_CASE("packed copies are shared by copies, and go when the value can change") {
    context<cpu> ctx(1);
    parameter<float, cpu> p = counted(3, 2);
    const auto drops = [&](auto change) {
      p.freeze();
      p.pack(ctx);
      REQUIRE(p.packed() != nullptr);
      change();
      return p.packed() == nullptr && p.packed_transpose() == nullptr;
    };
    p.freeze();
    p.pack(ctx, packing::forward);
    CHECK(p.packed() == nullptr);
    REQUIRE(p.packed_transpose() != nullptr);
    CHECK(p.packed_transpose()->rows() == 2);
    CHECK(p.packed_transpose()->cols() == 3);
    CHECK(p.packed_transpose()->bytes() == 2 * 16 * sizeof(float));
    CHECK_FALSE(drops([] {}));
    CHECK(p.packed()->rows() == 3);
    p.packed()->visit([](const auto* panels) {
      CHECK(static_cast<float>(panels[16]) == 2.0f);  // W(1, 0)
    });

    parameter<float, cpu> copy = p;
    CHECK(copy.packed() == p.packed());
    CHECK(std::as_const(copy).value()(2, 1) == 5.0f);
    CHECK(copy.packed() == p.packed());
    copy.value()(2, 1) = 7.0f;
    CHECK(copy.packed() == nullptr);
    CHECK(p.packed() != nullptr);

    CHECK(drops([&] { p.value(); }));
    CHECK(drops([&] { p.train(); }));
    CHECK(drops([&] { p.train_blocks(1, std::vector<index>{1}); }));
    CHECK(drops([&] { p.unpack(); }));
    CHECK_FALSE(drops([&] { p.freeze(); }));
    CHECK_FALSE(drops([&] { p.train_blocks(1, std::vector<index>{}); }));
    p.pack(ctx, packing::forward);
    CHECK(p.packed() == nullptr);
  }

  TEST_CASE("a value is packed in half the memory, and stays as it is") {
    context<cpu> ctx(1);
    matrix<float, cpu> w(3, 2);
    w(2, 1) = 1.0f + 0x1p-10f;
    parameter<float, cpu> p("weight", std::move(w));
    p.freeze();
    p.pack(ctx, packing::both, weight_storage::bfloat16);
    REQUIRE(p.packed() != nullptr);
    CHECK(p.packed_transpose()->bytes() == 2 * 16 * sizeof(bfloat16));
    CHECK(std::as_const(p).value()(2, 1) == 1.0f + 0x1p-10f);
    matrix<float, cpu> x(1, 2), y(1, 3);
    x(0, 1) = 1.0f;
    ops::gemm(ctx, x, transpose::no, *p.packed_transpose(), 0.0f, y.view());
    CHECK(y(0, 2) == 1.0f);
  }

  TEST_CASE("packed copies stay where new ones are refused") {
    context<cpu> ctx(1);
    parameter<double, cpu> p("weight", matrix<double, cpu>(3, 2));
    p.freeze();
    p.pack(ctx);
    const packed_matrix<double, cpu>* const before = p.packed();
    CHECK_THROWS_WITH_AS(p.pack(ctx, packing::both, weight_storage::bfloat16),
                         "talpa::packed_matrix: 'storage' is bfloat16, expected exact = storage of "
                         "doubles",
                         value_error);
    CHECK(p.packed() == before);
    CHECK(p.packed_transpose() != nullptr);
  }

  TEST_CASE("packed copies that the caller made are taken, others refused") {
    context<cpu> ctx(1);
    parameter<float, cpu> p = counted(3, 2);
    using packed = packed_matrix<float, cpu>;
    const auto turned = [&] { return packed(ctx, std::as_const(p).value(), transpose::yes); };
    const auto plain = [&] { return packed(ctx, std::as_const(p).value(), transpose::no); };
    CHECK_THROWS_WITH_AS(p.pack(turned(), plain()),
                         "talpa::parameter::pack: 'value' is trainable, expected frozen = state in "
                         "which weight can be packed",
                         value_error);
    p.freeze();
    const packed owner = plain(), mapped = packed::borrow(owner.memory(), 3, 2);
    p.pack(turned(), mapped);
    CHECK(p.packed()->memory().data() == mapped.memory().data());
    const packed* const before = p.packed_transpose();
    CHECK_THROWS_WITH_AS(p.pack(plain()),
                         "talpa::parameter::pack: 'transposed' has shape [3, 2], expected [2, 3] = "
                         "value transposed",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        p.pack(turned(), turned()),
        "talpa::parameter::pack: 'plain' has shape [2, 3], expected [3, 2] = value", shape_error);
    CHECK(p.packed_transpose() == before);
    p.pack(turned());
    CHECK(p.packed_transpose() != nullptr);
    CHECK(p.packed() == nullptr);
    matrix<float, cpu> x(1, 2), y(1, 3);
    x(0, 1) = 1.0f;
    ops::gemm(ctx, x, transpose::no, *p.packed_transpose(), 0.0f, y.view());
    CHECK(y(0, 2) == 5.0f);
  }

  TEST_CASE("a value that trains is not packed") {
    context<cpu> ctx(1);
    parameter<float, cpu> p = counted(3, 2);
    const char* const text =
        "talpa::parameter::pack: 'value' is trainable, expected frozen = state in which weight can "
        "be packed";
    CHECK_THROWS_WITH_AS(p.pack(ctx), text, value_error);
    p.train_blocks(1, std::vector<index>{2});
    CHECK_THROWS_WITH_AS(p.pack(ctx), text, value_error);
    CHECK(p.packed_transpose() == nullptr);
  }

  TEST_CASE("a moved parameter keeps its memory, a copied one has its own") {
    parameter<float, cpu> p = counted(2, 2);
    const float* const data = p.value().data;
    parameter<float, cpu> moved = std::move(p);
    CHECK(moved.value().data == data);
    parameter<float, cpu> copied = moved;
    copied.value()(0, 0) = 8.0f;
    CHECK(moved.value()(0, 0) == 0.0f);
  }
}

}  // namespace talpa::parameter_test
