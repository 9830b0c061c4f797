// The product W_z z from bfloat16 factors, summed in float32: AVX512-BF16 and AMX.
//
// A is (rows, depth) row-major, depth a multiple of 32, padded with zeros; B lies in panels of 16 rows,
// [panel][depth / 2][16][2]: what vdpbf16ps and tdpbf16ps both read.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace infmoe {

namespace {

template <int kRows, int kPanels>
inline void tile_avx512(const uint32_t* a, int64_t pairs, const uint32_t* b, float* c, int64_t stride) {
  __m512 acc[kRows][kPanels];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_setzero_ps();
  for (int64_t i = 0; i < pairs; ++i) {
    __m512i panel[kPanels];
    for (int p = 0; p < kPanels; ++p) panel[p] = _mm512_loadu_si512(b + (p * pairs + i) * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * pairs + i]));
      for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], pair, (__m512bh)panel[p]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) _mm512_storeu_ps(c + r * stride + p * kLanes, acc[r][p]);
}

template <int kPanels>
inline void rows_avx512(const uint32_t* a, int64_t pairs, int64_t rows, const uint32_t* b, float* c, int64_t stride) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) tile_avx512<6, kPanels>(a + r * pairs, pairs, b, c + r * stride, stride);
  for (; r + 2 <= rows; r += 2) tile_avx512<2, kPanels>(a + r * pairs, pairs, b, c + r * stride, stride);
  for (; r < rows; ++r) tile_avx512<1, kPanels>(a + r * pairs, pairs, b, c + r * stride, stride);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace

void matmul_bf16_avx512(const void* a, int64_t depth, int64_t rows, const void* panels, int64_t columns, float* c,
                        int64_t stride) {
  const int64_t pairs = depth / 2, count = columns / kLanes;
  const auto* from = static_cast<const uint32_t*>(a);
  const auto* b = static_cast<const uint32_t*>(panels);
  int64_t p = 0;
  for (; p + 4 <= count; p += 4) rows_avx512<4>(from, pairs, rows, b + p * pairs * kLanes, c + p * kLanes, stride);
  for (; p < count; ++p) rows_avx512<1>(from, pairs, rows, b + p * pairs * kLanes, c + p * kLanes, stride);
}

// Two tiles of 16 rows by two panels: four accumulators, each loaded tile used twice.
void matmul_bf16_amx(const void* a, int64_t depth, int64_t rows, const void* panels, int64_t columns, float* c,
                        int64_t stride) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.colsb[t] = 64, config.rows[t] = 16;
  _tile_loadconfig(&config);
  const int64_t steps = depth / 32, count = columns / kLanes, panel_bytes = depth * 32, a_stride = depth * 2;
  const auto* a0 = static_cast<const char*>(a);
  const auto* b0 = static_cast<const char*>(panels);
  const int64_t c_stride = stride * 4;
  for (int64_t p = 0; p < count; p += 2) {
    const bool two_panels = p + 1 < count;
    const char* b = b0 + p * panel_bytes;
    for (int64_t r = 0; r < rows; r += 32) {
      const bool two_rows = r + 16 < rows;
      const char* top = a0 + r * a_stride;
      const char* low = top + 16 * a_stride;
      float* out = c + r * stride + p * kLanes;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = 0; s < steps; ++s) {
        _tile_loadd(4, top + s * 64, a_stride);
        _tile_loadd(6, b + s * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_rows) {
          _tile_loadd(5, low + s * 64, a_stride);
          _tile_dpbf16ps(2, 5, 6);
        }
        if (two_panels) {
          _tile_loadd(7, b + panel_bytes + s * 1024, 64);
          _tile_dpbf16ps(1, 4, 7);
          if (two_rows) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, out, c_stride);
      if (two_panels) _tile_stored(1, out + kLanes, c_stride);
      if (two_rows) {
        _tile_stored(2, out + 16 * stride, c_stride);
        if (two_panels) _tile_stored(3, out + 16 * stride + kLanes, c_stride);
      }
    }
  }
  _tile_release();
}

bool allow_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h: the kernel gives tiles on request
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace infmoe
#endif
