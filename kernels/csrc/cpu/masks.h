// Dropout masks (philox.h) on the CPU, in vectors: those of kMaskPixels pixels of a vector's channels at a time.
#pragma once

#include "../philox.h"
#include "simd.h"

namespace pdarts {

// A 64-bit element for each channel: of a vector of float that is two of them, the even and the odd channels.
typedef uint64_t Wide __attribute__((vector_size(kVector)));

// The product of the lower half of x, or of its elements, with `by`.
INLINE uint64_t multiply_lower(uint64_t x, uint32_t by) { return (x & 0xffffffff) * by; }
INLINE Wide multiply_lower(Wide x, uint32_t by) {
  Wide factor = Wide{} + by;
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)x, (__m512i)factor);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)x, (__m256i)factor);
#elif defined(__aarch64__)
  return (Wide)vmull_u32(vmovn_u64((uint64x2_t)x), vmovn_u64((uint64x2_t)factor));
#else
  return (x & uint64_t(0xffffffff)) * factor;
#endif
}

// The key of each round, in all elements of a vector.
struct MaskKeys {
  Wide rounds[kPhiloxRounds][2];

  explicit MaskKeys(uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (auto& round : rounds) {
      round[0] = Wide{} + k0, round[1] = Wide{} + k1;
      k0 += kPhiloxW0, k1 += kPhiloxW1;
    }
  }
};

INLINE uint64_t with_key(uint64_t x, const Wide& key) { return x ^ key[0]; }
INLINE Wide with_key(Wide x, const Wide& key) { return x ^ key; }

// The rounds of philox from `round` on. A word that all channels have in common is a number, not a vector: half of them
// in the first three rounds. What the upper halves hold means nothing.
template <int round, class C0, class C1, class C2, class C3>
INLINE void philox_rounds(C0 c0, C1 c1, C2 c2, C3 c3, const MaskKeys& keys, Wide (&words)[4]) {
  if constexpr (round == kPhiloxRounds) {
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
  } else {
    auto a = multiply_lower(c0, kPhiloxM0);  // a vector or a number, as c0 is
    auto b = multiply_lower(c2, kPhiloxM1);
    auto next0 = with_key((b >> 32) ^ c1, keys.rounds[round][0]);
    auto next2 = with_key((a >> 32) ^ c3, keys.rounds[round][1]);
    philox_rounds<round + 1>(next0, b, next2, a, keys, words);
  }
}

template <class A>
class Masks {
  static constexpr bool kFloat = sizeof(A) == 4;
  using V = typename Simd<A>::vec;
  using I = std::conditional_t<kFloat, int32_t, int64_t>;
  typedef int32_t Bits __attribute__((vector_size(kVector)));
  typedef int64_t LongBits __attribute__((vector_size(kVector)));
  using Signed = std::conditional_t<kFloat, Bits, LongBits>;

  Signed words[4];
  Signed last;  // the largest bits that are dropped

 public:
  // Of `pixel`, which is the first of its counter or the only one asked for, and of the channels from `channel` on.
  INLINE Masks(const MaskKeys& keys, int64_t pixel, int64_t channel, int64_t image, int64_t term, uint32_t threshold) {
    last = Signed{} + (I(threshold) - 1);
    Wide even[4], odd[4];
    auto draw = [&](int64_t first, Wide(&to)[4]) ALWAYS {
      Wide channels;
      for (int64_t i = 0; i < kVector / 8; i++) channels[i] = first + i * (kFloat ? 2 : 1);
      uint64_t group = pixel / kMaskPixels, n = image, t = term;
      philox_rounds<0>(group, channels, n, t, keys, to);
    };
    draw(channel, even);
    if (kFloat) draw(channel + 1, odd);
    constexpr uint64_t lower = 0xffffffff;
    for (int j = 0; j < 4; j++) words[j] = (Signed)(kFloat ? (even[j] & lower) | (odd[j] << 32) : even[j] & lower);
  }

  // x where it is kept, else 0; s: the pixel, or its distance from the first.
  template <class S>
  INLINE V kept(S s, V x) const {
    Signed word = words[s % kMaskPixels / 2];
    Signed bits = (s % 2 ? word >> 16 : word) & 0xffff;
    return (V)((Signed)x & (bits > last));
  }
};

}  // namespace pdarts
