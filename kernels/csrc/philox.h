// Dropout masks by counters: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), on the CPU and on CUDA. A mask is never stored: backward draws it again.
//
// Element i of channel c of image n of the mask of term t has 16 bits of its own: of philox((i / 8, c, n, t), key) the
// word i % 8 / 2, of which an even i has the lower half. They are a number from 0 to 2^16 - 1, and the element is
// dropped where that is below the rate times 2^16, rounded; the others are multiplied by the inverse of their share. So
// masks depend neither on threads nor on the memory format, and the rate is exact to 2^-17.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define PDARTS_BOTH __host__ __device__
#else
#define PDARTS_BOTH
#endif

namespace pdarts {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;  // what is added to the key after each round
constexpr int kPhiloxRounds = 10;
constexpr int kMaskPixels = 8;  // elements of a channel that share a counter

struct PhiloxWords {
  uint32_t at[4];
};

PDARTS_BOTH inline PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; round++, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    uint64_t a = static_cast<uint64_t>(kPhiloxM0) * c0, b = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(a);
  }
  return {{c0, c1, c2, c3}};
}

// What a rate means: elements whose bits are below `threshold` are dropped, the others multiplied by `scale`.
struct MaskRate {
  uint32_t threshold;  // 0: nothing is dropped; 2^16: everything
  float scale;

  PDARTS_BOTH explicit MaskRate(float rate) {
    float scaled = rate * 65536.0f;  // exact
    threshold = !(scaled > 0) ? 0 : scaled >= 65536.0f ? 65536 : static_cast<uint32_t>(scaled + 0.5f);
    scale = threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f;
  }
};

// The 16 bits of element i of a channel, from the words of its counter. On CUDA an index would put them into memory.
PDARTS_BOTH inline uint32_t bits_of(const PhiloxWords& words, int64_t i) {
  uint32_t even = i & 4 ? words.at[2] : words.at[0], odd = i & 4 ? words.at[3] : words.at[1];
  return (i & 2 ? odd : even) >> (i & 1 ? 16 : 0) & 0xffff;
}

}  // namespace pdarts
