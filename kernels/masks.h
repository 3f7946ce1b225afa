// Dropout masks (philox.h) on the CPU, in vectors: those of kMaskPixels pixels of a vector's channels at a time.
#pragma once

#include "philox.h"
#include "simd.h"

namespace pdarts {

// As many 32-bit elements as a vector has of float and of double; gcc wants the sizes of vectors to be no one's parameter.
typedef uint32_t Words __attribute__((vector_size(kVector)));
typedef uint32_t HalfWords __attribute__((vector_size(kVector / 2)));
typedef uint64_t Products __attribute__((vector_size(kVector)));
typedef uint64_t HalfProducts __attribute__((vector_size(kVector / 2)));
typedef int32_t Bits __attribute__((vector_size(kVector)));
typedef int64_t LongBits __attribute__((vector_size(kVector)));

template <class A>
class Masks {
  static constexpr bool kFloat = sizeof(A) == 4;
  using V = typename Simd<A>::vec;
  using U = std::conditional_t<kFloat, Words, HalfWords>;
  using Wide = std::conditional_t<kFloat, Products, HalfProducts>;

  U words[4];
  U threshold;

  // The products of the lower halves of the 64-bit elements.
  static INLINE Wide multiply_lower(Wide a, Wide b) {
#ifdef __AVX512F__
    if constexpr (sizeof(Wide) == 64) return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#endif
#ifdef __AVX2__
    if constexpr (sizeof(Wide) == 32) return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#endif
    constexpr uint64_t lower = 0xffffffff;
    return (a & lower) * (b & lower);
  }

  // The upper and the lower halves of the products with `by`.
  static INLINE void multiply(U x, uint32_t by, U& upper, U& lower) {
    Wide factor = Wide{} + by, even = multiply_lower((Wide)x, factor), odd = multiply_lower((Wide)x >> 32, factor);
    constexpr uint64_t low = 0xffffffff;
    upper = (U)((even >> 32) | (odd & ~low)), lower = (U)((even & low) | (odd << 32));
  }

 public:
  // Those of `pixel`, which is the first of its counter or the only one asked for, and channels `channel`, ...
  INLINE Masks(uint64_t key, int64_t pixel, int64_t channel, int64_t image, int64_t term, uint32_t threshold)
      : threshold(U{} + threshold) {
    U c0 = U{} + uint32_t(pixel / kMaskPixels), c1, c2 = U{} + uint32_t(image), c3 = U{} + uint32_t(term), a, b;
    for (int64_t i = 0; i < Simd<A>::W; i++) c1[i] = uint32_t(channel + i);
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    unroll<kPhiloxRounds>([&](auto round) ALWAYS {
      U upper_a, upper_b;
      multiply(c0, kPhiloxM0, upper_a, a), multiply(c2, kPhiloxM1, upper_b, b);
      c0 = upper_b ^ c1 ^ (k0 + uint32_t(round) * kPhiloxW0), c1 = b;
      c2 = upper_a ^ c3 ^ (k1 + uint32_t(round) * kPhiloxW1), c3 = a;
    });
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
  }

  // x where it is kept, else 0; s: the pixel, or its distance from the first.
  template <class S>
  INLINE V kept(S s, V x) const {
    U word = words[s % kMaskPixels / 2];
    U bits = s % 2 ? word >> 16 : word & 0xffff;
    if constexpr (kFloat) {
      return (V)((Bits)x & (bits >= threshold));
    } else {
      return (V)((LongBits)x & __builtin_convertvector(bits >= threshold, LongBits));
    }
  }
};

}  // namespace pdarts
