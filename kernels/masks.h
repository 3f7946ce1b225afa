// Dropout masks (philox.h) on the CPU, in vectors: those of kMaskPixels pixels of a vector's channels at a time.
#pragma once

#include "philox.h"
#include "simd.h"

namespace pdarts {

// A 64-bit element for each channel: of a vector of float that is two of them, the even and the odd channels.
typedef uint64_t Wide __attribute__((vector_size(kVector)));

// The products of the lower halves of the elements.
INLINE Wide multiply_lower(Wide a, Wide b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  constexpr uint64_t lower = 0xffffffff;
  return (a & lower) * (b & lower);
#endif
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

  // The words of channels `channel`, channel + step, ...; what their upper halves hold means nothing.
  static INLINE void draw(
      uint64_t key, uint64_t group, uint64_t channel, uint64_t step, uint64_t image, uint64_t term, Wide (&c)[4]) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    c[0] = Wide{} + group, c[2] = Wide{} + image, c[3] = Wide{} + term;
    for (int64_t i = 0; i < kVector / 8; i++) c[1][i] = channel + i * step;
    unroll<kPhiloxRounds>([&](auto round) ALWAYS {
      Wide a = multiply_lower(c[0], Wide{} + kPhiloxM0), b = multiply_lower(c[2], Wide{} + kPhiloxM1);
      c[0] = (b >> 32) ^ c[1] ^ (k0 + uint32_t(round) * kPhiloxW0), c[1] = b;
      c[2] = (a >> 32) ^ c[3] ^ (k1 + uint32_t(round) * kPhiloxW1), c[3] = a;
    });
  }

 public:
  // Of `pixel`, which is the first of its counter or the only one asked for, and of the channels from `channel` on.
  INLINE Masks(uint64_t key, int64_t pixel, int64_t channel, int64_t image, int64_t term, uint32_t threshold) {
    last = Signed{} + (I(threshold) - 1);
    constexpr uint64_t lower = 0xffffffff;
    Wide even[4], odd[4];
    draw(key, pixel / kMaskPixels, channel, kFloat ? 2 : 1, image, term, even);
    if (kFloat) draw(key, pixel / kMaskPixels, channel + 1, 2, image, term, odd);
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
