// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/scalar.hpp>

#include <cstdint>

/// Random numbers as functions of a position.
///
/// Element i of a stream is computed from (seed, stream, i) alone: nothing is carried from one
/// element to the next, so a loop gives the same bits in any order, for any number of threads, and
/// on a CUDA device. Behind it is Philox4x32-10, which turns a 128-bit counter and a 64-bit key
/// into 128 random bits: the key is the seed, the counter is (block, stream). Equal (seed, stream,
/// i) always mean equal numbers; anything else means a different counter or key.
///
/// Layout, a promise to kernels that want a whole block at once:
///   32-bit element i: word i mod 4 of block i / 4 (random_bits32, uniform<float>, keep);
///   64-bit element i: words 2 (i mod 2), low half first, of block i / 2 (random_bits64,
///     uniform<double>, uniform_index);
///   normal<float>: elements 2 j and 2 j + 1 use 64-bit element j, normal<double>: block j.
/// Numbers of different kinds from one stream are therefore not independent: take a stream for each
/// purpose from a generator.
namespace talpa {

/// Name of one sequence of random numbers; a plain value, to be copied into kernels.
struct random_stream {
  std::uint64_t seed;
  std::uint64_t stream;

  friend constexpr bool operator==(const random_stream&, const random_stream&) = default;
};

/// 128 bits: the counter and the result of philox, words in the order of the paper.
struct philox_block {
  std::uint32_t word[4];

  friend constexpr bool operator==(const philox_block&, const philox_block&) = default;
};

/// The 64-bit key of philox.
struct philox_key {
  std::uint32_t word[2];
};

inline constexpr int philox_rounds = 10;
/// What words 0 and 2 of a block are multiplied by.
inline constexpr std::uint32_t philox_first = 0xD2511F53u, philox_second = 0xCD9E8D57u;

/// One round of philox: what is multiplied changes places, what is not is mixed in with the key.
TALPA_HD constexpr philox_block philox_round(philox_block c, philox_key k) {
  const std::uint64_t p0 = std::uint64_t(philox_first) * c.word[0];
  const std::uint64_t p1 = std::uint64_t(philox_second) * c.word[2];
  return {{std::uint32_t(p1 >> 32) ^ c.word[1] ^ k.word[0], std::uint32_t(p1),
           std::uint32_t(p0 >> 32) ^ c.word[3] ^ k.word[1], std::uint32_t(p0)}};
}
/// The key of the next round: the golden ratio's fraction and that of sqrt 3 are added.
TALPA_HD constexpr philox_key next_key(philox_key k) {
  return {{k.word[0] + 0x9E3779B9u, k.word[1] + 0xBB67AE85u}};
}

/// Computes the block function Philox4x32 with ten rounds.
///
/// Cost: 20 multiplications 32 x 32 -> 64.
/// Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011; ten
/// rounds are their default, which passes the BigCrush tests.
TALPA_HD constexpr philox_block philox(philox_block counter, philox_key key) {
  for (int round = 0; round < philox_rounds; ++round) {
    counter = philox_round(counter, key);
    key = next_key(key);
  }
  return counter;
}

/// Returns block j of a stream: the bits of elements 4 j .. 4 j + 3 of 32 bits, 2 j and 2 j + 1
/// of 64.
TALPA_HD constexpr philox_block random_block(random_stream s, std::uint64_t j) {
  return philox({{std::uint32_t(j), std::uint32_t(j >> 32), std::uint32_t(s.stream),
                  std::uint32_t(s.stream >> 32)}},
                {{std::uint32_t(s.seed), std::uint32_t(s.seed >> 32)}});
}

/// Returns 32-bit element i of a stream.
TALPA_HD constexpr std::uint32_t random_bits32(random_stream s, std::uint64_t i) {
  // Chosen by conditions: an index known only at run time puts a block into memory on a device.
  const philox_block block = random_block(s, i / 4);
  const std::uint32_t first = i % 4 < 2 ? block.word[0] : block.word[2];
  const std::uint32_t second = i % 4 < 2 ? block.word[1] : block.word[3];
  return i % 2 == 0 ? first : second;
}

/// Returns 64-bit element i of a stream.
TALPA_HD constexpr std::uint64_t random_bits64(random_stream s, std::uint64_t i) {
  const philox_block block = random_block(s, i / 2);
  const std::uint32_t low = i % 2 == 0 ? block.word[0] : block.word[2];
  const std::uint32_t high = i % 2 == 0 ? block.word[1] : block.word[3];
  return std::uint64_t(high) << 32 | low;
}

namespace detail {

// Multiples of 2^-24 and 2^-53, exactly.
TALPA_HD constexpr float unit_float(std::uint32_t bits) {
  return float(std::int32_t(bits >> 8)) * (1.0f / 16777216.0f);
}
TALPA_HD constexpr double unit_double(std::uint64_t bits) {
  return double(std::int64_t(bits >> 11)) * (1.0 / 9007199254740992.0);
}

// High half of a 128-bit product.
TALPA_HD constexpr std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b) {
  constexpr std::uint64_t low = 0xffffffffu;
  const std::uint64_t mixed = (a >> 32) * (b & low) + ((a & low) * (b & low) >> 32);
  const std::uint64_t other = (a & low) * (b >> 32) + (mixed & low);
  return (a >> 32) * (b >> 32) + (mixed >> 32) + (other >> 32);
}

// One of the two normal numbers made of a radius sqrt(-2 log open_unit) and an angle in turns.
template <class T>
TALPA_HD inline T box_muller(T open_unit, T turns, bool second) {
  const T radius = math::sqrt(T(-2) * math::log(open_unit));
  const math::cosine_sine<T> angle = math::cos_sin_turns(turns);
  return math::mul(radius, second ? angle.sine : angle.cosine);
}

}  // namespace detail

/// Returns element i of a stream of uniform numbers in [0, 1): multiples of 2^-24 for float, of
/// 2^-53 for double, all equally likely.
template <floating T>
TALPA_HD constexpr T uniform(random_stream s, std::uint64_t i) {
  if constexpr (sizeof(T) == 4) {
    return detail::unit_float(random_bits32(s, i));
  } else {
    return detail::unit_double(random_bits64(s, i));
  }
}

/// Returns element i of a stream of normal numbers, mean 0 and variance 1.
///
/// Box-Muller: sqrt(-2 log u) (cos, sin)(2 pi v) gives elements 2 j and 2 j + 1. u is
/// (k + 1/2) / 2^b rounded to T, so it is never zero; b = 32 for float, whose numbers end at
/// |z| <= 6.77, and 53 for double, |z| <= 8.66. v is uniform<T> of the rest of the bits. The bits
/// are portable because log, cosine and sine are those of core/math.hpp.
/// Source: Box and Muller, A note on the generation of random normal deviates, 1958.
template <floating T>
TALPA_HD inline T normal(random_stream s, std::uint64_t i) {
  const std::uint64_t pair = i / 2;
  const bool second = i % 2 != 0;
  if constexpr (sizeof(T) == 4) {
    const std::uint64_t bits = random_bits64(s, pair);
    const float k = float(std::uint32_t(bits));
    const float u = math::fma(k, 1.0f / 4294967296.0f, 0.5f / 4294967296.0f);
    return detail::box_muller(u, detail::unit_float(std::uint32_t(bits >> 32)), second);
  } else {
    const philox_block block = random_block(s, pair);
    const std::uint64_t k = (std::uint64_t(block.word[1]) << 32 | block.word[0]) >> 11;
    const std::uint64_t angle = std::uint64_t(block.word[3]) << 32 | block.word[2];
    const double u = (double(std::int64_t(k)) + 0.5) * (1.0 / 9007199254740992.0);
    return detail::box_muller(u, detail::unit_double(angle), second);
  }
}

namespace detail {

/// What 32 random bits are less than with a probability: 0..2^32, none for NaN.
TALPA_HD constexpr std::uint64_t keep_threshold(float keep_probability) {
  const float positive = keep_probability > 0.0f ? keep_probability : 0.0f;
  return std::uint64_t((positive < 1.0f ? positive : 1.0f) * 4294967296.0f);
}

}  // namespace detail

/// Decides whether element i of a dropout mask is kept: true with probability keep_probability.
///
/// The probability is rounded down to a multiple of 2^-32. At or above one every element is kept,
/// at or below zero and for NaN none.
TALPA_HD constexpr bool keep(random_stream s, std::uint64_t i, float keep_probability) {
  return random_bits32(s, i) < detail::keep_threshold(keep_probability);
}

/// Returns element i of a stream of uniform integers in [0, n), for n >= 1.
///
/// The high half of the product of n and a random 64-bit integer. The probability of a value is off
/// 1 / n by less than 2^-64, so no test can see the bias below about (2^64 / n)^2 draws.
/// Zero for n = 0.
/// Source: Lemire, Fast random integer generation in an interval, 2019, without its rejection step.
TALPA_HD constexpr std::uint64_t uniform_index(random_stream s, std::uint64_t i, std::uint64_t n) {
  return detail::multiply_high(random_bits64(s, i), n);
}

/// Hands out streams, each a fresh one.
///
/// The whole state is the seed and the number of the next stream. Storing both and constructing
/// from both resumes a run where it stopped. A copy hands out the same streams as the original.
/// There is no global generator and no default seed.
class generator {
 public:
  /// Starts at stream 0 of a seed, or resumes at next_stream.
  constexpr explicit generator(std::uint64_t seed, std::uint64_t next_stream = 0)
      : state_{seed, next_stream} {}

  /// Returns the next stream and moves on.
  constexpr random_stream next() {
    const random_stream taken = state_;
    ++state_.stream;
    return taken;
  }

  constexpr std::uint64_t seed() const { return state_.seed; }

  /// Number of the stream that next() will return.
  constexpr std::uint64_t next_stream() const { return state_.stream; }

  friend constexpr bool operator==(const generator&, const generator&) = default;

 private:
  random_stream state_;
};

}  // namespace talpa
