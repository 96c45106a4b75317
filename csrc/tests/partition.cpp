// The partition of rows into chunks, by itself, for the tests: the library does not show it.
#include "internal.h"

#include "stream.h"

extern "C" int64_t cut_chunks(const int32_t *ptr, int64_t num_rows, int64_t most, int64_t parts, int32_t *first_row) {
  return rarefy::cut_chunks(ptr, num_rows, most, parts, first_row);
}
