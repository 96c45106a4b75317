// Images in bands: VL images side by side for each pixel, so that a nonzero of a convolution works on whole vectors.
// band[channel][row][pixel][VL], float32, with the padding around the pixels as zeros; lanes past the last image are zero.
// A band slides down the images: what the next rows need again moves up, and only new rows are packed.
#pragma once

#include "pack.h"

namespace rarefy {
namespace {

// A caller's images, of either element type. One of the strides is 1: that of the image, the channel, or the pixel; in
// the last case the rows of a channel follow each other without a gap.
struct Images {
  void *data;
  int64_t count, channels, height, width;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;  // in elements
  bool half;                                                       // bfloat16
};

struct Band {
  float *data;
  int64_t channels, rows, width;  // width in pixels, padding included
  int64_t left;                   // pixels of padding before a row
  float *at(int64_t c, int64_t row, int64_t pixel) const { return data + ((c * rows + row) * width + pixel) * VL; }
  int64_t floats() const { return channels * rows * width * VL; }
};

// Vectors of VL lanes at out + places[i] from `live` rows of `count` contiguous elements, `stride` apart. What is past the
// last whole block is read together with elements before it, or, if there are none, from a copy.
template <class T>
void pack_run(const T *source, int64_t stride, int64_t live, int64_t count, const int32_t *places, float *out) {
  T few[VL * VL];
  int64_t from = 0;
  if (count < VL) {
    for (int64_t n = 0; n < live; ++n) {
      for (int64_t i = 0; i < VL; ++i) few[n * VL + i] = i < count ? source[n * stride + i] : T(0);
    }
    source = few;
    stride = VL;
  }
  while (from < count) {
    const int64_t first = max64(0, min64(from, count - VL));
    vec block[VL];
    if (live == VL) {
#pragma GCC unroll 16
      for (int n = 0; n < VL; ++n) block[n] = load_any(source + n * stride + first);
    } else {
#pragma GCC unroll 16
      for (int n = 0; n < VL; ++n) block[n] = n < live ? load_any(source + n * stride + first) : vec{};
    }
    transpose(block);
    if (count >= VL) {
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) store(out + places[first + i], block[i]);
    } else {
      for (int i = 0; i < VL; ++i) {
        if (i < count) store(out + places[i], block[i]);
      }
    }
    from = first + VL;
  }
}

// The reverse. Elements before the last block may be written twice, to the same.
template <class T>
void unpack_run(const float *in, const int32_t *places, int64_t stride, int64_t live, int64_t count, T *target) {
  for (int64_t from = 0; from < count;) {
    const int64_t first = max64(0, min64(from, count - VL));
    vec block[VL];
    if (count >= VL) {
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) block[i] = load(in + places[first + i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) block[i] = i < count ? load(in + places[i]) : vec{};
    }
    transpose(block);
    if (count >= VL) {
      if (live == VL) {
#pragma GCC unroll 16
        for (int n = 0; n < VL; ++n) store_any(target + n * stride + first, block[n]);
      } else {
        for (int n = 0; n < VL; ++n) {
          if (n < live) store_any(target + n * stride + first, block[n]);
        }
      }
    } else {
      for (int64_t n = 0; n < live; ++n) {
        for (int64_t i = 0; i < count; ++i) narrow_to(target + n * stride + i, block[n][i]);
      }
    }
    from = first + VL;
  }
}

// Where the elements of a run lie in a band.
struct Places {
  int32_t *pixels;    // of a channel, row by row, without padding
  int32_t *channels;  // of a pixel
};

inline int64_t num_pixel_places(const Images &images, const Band &band) { return band.rows * images.width; }

inline void fill_places(const Images &images, const Band &band, const Places &places) {
  for (int64_t i = 0; i < num_pixel_places(images, band); ++i) {
    places.pixels[i] = int32_t((i / images.width * band.width + i % images.width) * VL);
  }
  for (int64_t c = 0; c < band.channels; ++c) places.channels[c] = int32_t(c * band.rows * band.width * VL);
}

template <class T, class Copy, class Runs>
void each_run(const Images &images, int64_t first_image, int64_t live, int64_t row, int64_t end_row, const Band &band,
              int64_t band_row, const Places &places, Copy copy, Runs run) {
  T *data = static_cast<T *>(images.data) + first_image * images.image_stride + row * images.row_stride;
  if (images.image_stride == 1 && live == VL) {
    for (int64_t c = 0; c < images.channels; ++c) {
      for (int64_t r = 0; r < end_row - row; ++r) {
        T *pixels = data + c * images.channel_stride + r * images.row_stride;
        float *packed = band.at(c, band_row + r, band.left);
        for (int64_t p = 0; p < images.width; ++p) copy(pixels + p * images.pixel_stride, packed + p * VL);
      }
    }
  } else if (images.pixel_stride == 1) {
    for (int64_t c = 0; c < images.channels; ++c) {
      run(data + c * images.channel_stride, (end_row - row) * images.width, places.pixels, band.at(c, band_row, band.left));
    }
  } else if (images.channel_stride == 1) {
    for (int64_t r = 0; r < end_row - row; ++r) {
      for (int64_t p = 0; p < images.width; ++p) {
        run(data + r * images.row_stride + p * images.pixel_stride, images.channels, places.channels,
            band.at(0, band_row + r, band.left + p));
      }
    }
  } else {  // images side by side, and not a whole vector of them: one element at a time
    for (int64_t c = 0; c < images.channels; ++c) {
      for (int64_t r = 0; r < end_row - row; ++r) {
        for (int64_t p = 0; p < images.width; ++p) {
          run(data + c * images.channel_stride + r * images.row_stride + p * images.pixel_stride, 1, places.pixels,
              band.at(c, band_row + r, band.left + p));
        }
      }
    }
  }
}

template <class T>
void pack_rows_of(const Images &images, int64_t first_image, int64_t live, int64_t row, int64_t end_row, const Band &band,
                  int64_t band_row, const Places &places) {
  each_run<T>(
      images, first_image, live, row, end_row, band, band_row, places,
      [](const T *from, float *to) { store(to, load_any(from)); },
      [&](const T *from, int64_t count, const int32_t *at, float *to) {
        pack_run(from, images.image_stride, live, count, at, to);
      });
}

template <class T>
void unpack_rows_of(const Band &band, int64_t band_row, const Images &images, int64_t first_image, int64_t live,
                    int64_t row, int64_t end_row, const Places &places) {
  each_run<T>(
      images, first_image, live, row, end_row, band, band_row, places,
      [](T *to, const float *from) { store_any(to, load(from)); },
      [&](T *to, int64_t count, const int32_t *at, const float *from) {
        unpack_run(from, at, images.image_stride, live, count, to);
      });
}

// Rows [row, row + count) of the images, which may lie outside them and are zero there, to `count` rows of the band.
inline void pack_band(const Images &images, int64_t first_image, int64_t row, int64_t count, const Band &band,
                      int64_t band_row, const Places &places) {
  const int64_t live = min64(VL, images.count - first_image);
  const int64_t begin = min64(max64(row, 0), row + count), end = max64(begin, min64(row + count, images.height));
  for (int64_t r = row; r < row + count; ++r) {
    if (r >= begin && r < end) continue;
    for (int64_t c = 0; c < band.channels; ++c) {
      memset(band.at(c, band_row + r - row, 0), 0, size_t(band.width * VL) * sizeof(float));
    }
  }
  if (begin == end) return;
  if (images.half) {
    pack_rows_of<bf16>(images, first_image, live, begin, end, band, band_row + begin - row, places);
  } else {
    pack_rows_of<float>(images, first_image, live, begin, end, band, band_row + begin - row, places);
  }
}

// `count` rows of the band to rows [row, row + count) of the images; those outside are left out.
inline void unpack_band(const Band &band, int64_t band_row, int64_t row, int64_t count, const Images &images,
                        int64_t first_image, const Places &places) {
  const int64_t live = min64(VL, images.count - first_image);
  const int64_t begin = max64(row, 0), end = min64(row + count, images.height);
  if (begin >= end) return;
  if (images.half) {
    unpack_rows_of<bf16>(band, band_row + begin - row, images, first_image, live, begin, end, places);
  } else {
    unpack_rows_of<float>(band, band_row + begin - row, images, first_image, live, begin, end, places);
  }
}

// Rows [from, rows) move to the top; the rest are zeroed if `zero`.
inline void slide(const Band &band, int64_t from, bool zero) {
  const int64_t kept = max64(0, band.rows - from);
  for (int64_t c = 0; c < band.channels; ++c) {
    if (kept > 0) memmove(band.at(c, 0, 0), band.at(c, from, 0), size_t(kept * band.width * VL) * sizeof(float));
    if (zero) memset(band.at(c, kept, 0), 0, size_t((band.rows - kept) * band.width * VL) * sizeof(float));
  }
}

}  // namespace
}  // namespace rarefy
