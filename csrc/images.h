// Images in bands: kLanes images side by side for each pixel, so that a nonzero of a convolution works on whole vectors, and a
// tap is a shift by whole vectors, whatever a cell is. band[channel][row][pixel][kLanes], in cells (float32 for gradients),
// with the padding around the pixels as zeros; lanes past the last image are zero.
// A band slides down the images: what the next rows need again moves up, and only new rows are packed.
#pragma once

#include "pack.h"

namespace rarefy {
namespace {

// A caller's images, of either element type: [image][row][pixel][channel], which torch calls channels_last.
struct Images {
  void *data;
  int64_t count, channels, height, width;
  bool half;  // bfloat16
  const float *scale = nullptr, *shift = nullptr;  // packed is ReLU(x scale + shift), channel by channel; null: x
  int64_t image_stride() const { return height * width * channels; }
  int64_t at(int64_t image, int64_t row, int64_t pixel) const {
    return ((image * height + row) * width + pixel) * channels;
  }
  int64_t live(int64_t first_image) const { return min64(kLanes, count - first_image); }
};

// T: cell, or float for sums.
template <class T>
struct Band {
  T *data;
  int64_t channels, rows, width;  // width in pixels, padding included
  int64_t left;                   // pixels of padding before a row
  T *at(int64_t c, int64_t row, int64_t pixel) const { return data + ((c * rows + row) * width + pixel) * kLanes; }
  int64_t size() const { return channels * rows * width * kLanes; }
  int64_t channel_step() const { return rows * width * kLanes; }
  void clear() const { memset(data, 0, size_t(size()) * sizeof(T)); }
};

#if !defined(RAREFY_DOT_CELLS)
// The channels of one pixel of `live` images, `stride` elements apart: out[c * step] holds VL lanes. What is past the last
// whole block of channels is read together with channels before it, or, if there are none, from a copy.
template <bool ACT, class T>
void pack_pixel(const T *pixel, int64_t stride, int64_t live, int64_t channels, const float *scale, const float *shift,
                float *out, int64_t step) {
  T few[VL * VL];
  if (channels < VL) {
    for (int64_t n = 0; n < live; ++n) {
      for (int64_t c = 0; c < VL; ++c) few[n * VL + c] = c < channels ? pixel[n * stride + c] : T(0);
    }
    pixel = few;
    stride = VL;
  }
  for (int64_t from = 0; from < channels; from += VL) {
    const int64_t first = max64(0, min64(from, channels - VL));
    vec block[VL];
    if (live == VL) {
#pragma GCC unroll 16
      for (int n = 0; n < VL; ++n) block[n] = load_any(pixel + n * stride + first);
    } else {
#pragma GCC unroll 16
      for (int n = 0; n < VL; ++n) block[n] = n < live ? load_any(pixel + n * stride + first) : vec{};
    }
    transpose(block);
    float *to = out + first * step;
    const auto put = [&](int c) __attribute__((always_inline)) {
      vec v = block[c];
      if (ACT) {
        v = v * broadcast(scale[first + c]) + broadcast(shift[first + c]);
        v = v > 0.0f ? v : vec{};
      }
      store(to + c * step, v);
    };
    if (channels >= VL) {
#pragma GCC unroll 16
      for (int c = 0; c < VL; ++c) put(c);
    } else {
      for (int c = 0; c < channels; ++c) put(c);
    }
  }
}

#endif

// The reverse, from sums of VL images. Channels before the last block may be written twice, to the same.
template <class T>
void unpack_pixel(const float *in, int64_t step, int64_t stride, int64_t live, int64_t channels, T *pixel) {
  for (int64_t from = 0; from < channels; from += VL) {
    const int64_t first = max64(0, min64(from, channels - VL));
    const float *block_in = in + first * step;
    vec block[VL];
    if (channels >= VL) {
#pragma GCC unroll 16
      for (int c = 0; c < VL; ++c) block[c] = load(block_in + c * step);
      transpose(block);
      if (live == VL) {
#pragma GCC unroll 16
        for (int n = 0; n < VL; ++n) store_any(pixel + n * stride + first, block[n]);
      } else {
        for (int n = 0; n < live; ++n) store_any(pixel + n * stride + first, block[n]);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t n = 0; n < live; ++n) narrow_to(pixel + n * stride + c, block_in[c * step + n]);
      }
    }
  }
}

// One pixel of the images from `first_image` on: out[c * step].
template <class T>
void pack_pixel_of(const T *pixels, const Images &images, int64_t live, cell *out, int64_t step) {
  if (images.scale != nullptr) {
    pack_pixel<true>(pixels, images.image_stride(), live, images.channels, images.scale, images.shift, out, step);
  } else {
    pack_pixel<false>(pixels, images.image_stride(), live, images.channels, nullptr, nullptr, out, step);
  }
}
inline void pack_pixel_of(const Images &images, int64_t first_image, int64_t row, int64_t pixel, cell *out, int64_t step) {
  const int64_t at = images.at(first_image, row, pixel), live = images.live(first_image);
  if (images.half) {
    pack_pixel_of(static_cast<const bf16 *>(images.data) + at, images, live, out, step);
  } else {
    pack_pixel_of(static_cast<const float *>(images.data) + at, images, live, out, step);
  }
}
// The reverse, from sums.
inline void unpack_pixel_of(const float *in, int64_t step, const Images &images, int64_t first_image, int64_t row,
                            int64_t pixel) {
  for (int lane = 0; lane < kLanes && first_image + lane < images.count; lane += VL) {
    const int64_t at = images.at(first_image + lane, row, pixel), live = min64(VL, images.live(first_image) - lane);
    if (images.half) {
      unpack_pixel(in + lane, step, images.image_stride(), live, images.channels, static_cast<bf16 *>(images.data) + at);
    } else {
      unpack_pixel(in + lane, step, images.image_stride(), live, images.channels, static_cast<float *>(images.data) + at);
    }
  }
}

// Rows [row, row + count) of the images, which may lie outside them and are zero there, to `count` rows of the band.
inline void pack_band(const Images &images, int64_t first_image, int64_t row, int64_t count, const Band<cell> &band,
                      int64_t band_row) {
  for (int64_t r = 0; r < count; ++r) {
    if (row + r < 0 || row + r >= images.height) {
      for (int64_t c = 0; c < band.channels; ++c) {
        memset(band.at(c, band_row + r, 0), 0, size_t(band.width * kLanes) * sizeof(cell));
      }
      continue;
    }
    for (int64_t p = 0; p < images.width; ++p) {
      pack_pixel_of(images, first_image, row + r, p, band.at(0, band_row + r, band.left + p), band.channel_step());
    }
  }
}

// `count` rows of the band to rows [row, row + count) of the images; those outside are left out.
inline void unpack_band(const Band<float> &band, int64_t row, int64_t count, const Images &images, int64_t first_image) {
  for (int64_t r = max64(0, -row); r < min64(count, images.height - row); ++r) {
    for (int64_t p = 0; p < images.width; ++p) {
      unpack_pixel_of(band.at(0, r, band.left + p), band.channel_step(), images, first_image, row + r, p);
    }
  }
}

// Rows [from, rows) move to the top; the rest are zeroed if `zero`.
template <class T>
void slide(const Band<T> &band, int64_t from, bool zero) {
  const int64_t kept = max64(0, band.rows - from), row_bytes = band.width * kLanes * int64_t(sizeof(T));
  for (int64_t c = 0; c < band.channels; ++c) {
    if (kept > 0) memmove(band.at(c, 0, 0), band.at(c, from, 0), size_t(kept * row_bytes));
    if (zero) memset(band.at(c, kept, 0), 0, size_t((band.rows - kept) * row_bytes));
  }
}

}  // namespace
}  // namespace rarefy
