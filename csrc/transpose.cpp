// The transposed index by counting sort. Columns ascend inside a row, so rows come out ascending inside a column.
#include "internal.h"

namespace rarefy {
namespace {

template <class Index>
int transpose(int64_t num_rows, int64_t num_cols, const int32_t *crow, const Index *cols, int32_t *t_crow,
              Index *t_rows, int32_t *t_perm) {
  const int64_t num_units = crow[num_rows];
  for (int64_t c = 0; c <= num_cols; ++c) t_crow[c] = 0;
  for (int64_t k = 0; k < num_units; ++k) {
    const int64_t c = cols[k];
    if (c < 0 || c >= num_cols) return RAREFY_BAD_ARGUMENT;
    ++t_crow[c + 1];
  }
  for (int64_t c = 0; c < num_cols; ++c) t_crow[c + 1] += t_crow[c];
  // t_crow[c] serves as the cursor of column c: it ends as the start of column c + 1, and is shifted back below.
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int32_t k = crow[r]; k < crow[r + 1]; ++k) {
      const int32_t at = t_crow[cols[k]]++;
      t_rows[at] = static_cast<Index>(r);
      t_perm[at] = k;
    }
  }
  for (int64_t c = num_cols; c > 0; --c) t_crow[c] = t_crow[c - 1];
  t_crow[0] = 0;
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy

int rarefy_transpose(int64_t num_unit_rows, int64_t num_unit_cols, const int32_t *crow, const void *cols,
                     int32_t *t_crow, void *t_rows, int32_t *t_perm, int32_t index_bytes) {
  if (num_unit_rows < 0 || num_unit_cols < 0 || crow == nullptr || t_crow == nullptr) return RAREFY_BAD_ARGUMENT;
  if (crow[num_unit_rows] > 0 && (cols == nullptr || t_rows == nullptr || t_perm == nullptr)) {
    return RAREFY_BAD_ARGUMENT;
  }
  if (index_bytes == 2) {
    return rarefy::transpose(num_unit_rows, num_unit_cols, crow, static_cast<const uint16_t *>(cols), t_crow,
                             static_cast<uint16_t *>(t_rows), t_perm);
  }
  if (index_bytes == 4) {
    return rarefy::transpose(num_unit_rows, num_unit_cols, crow, static_cast<const int32_t *>(cols), t_crow,
                             static_cast<int32_t *>(t_rows), t_perm);
  }
  return RAREFY_BAD_ARGUMENT;
}
