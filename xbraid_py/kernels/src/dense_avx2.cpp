// The kernels with AVX2 and FMA.

#define XBRAID_TABLE avx2
#define XBRAID_NAME "avx2"
#define XBRAID_MAX_WIDTH 64
#define XBRAID_BYTES 32
#define XBRAID_ROWS 4
#define XBRAID_COLUMNS 2
#include "dense_impl.hpp"
