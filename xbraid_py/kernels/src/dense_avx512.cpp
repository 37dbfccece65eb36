// The kernels with AVX-512.

#define XBRAID_TABLE avx512
#define XBRAID_NAME "avx512"
#define XBRAID_MAX_WIDTH 64
#define XBRAID_BYTES 64
#define XBRAID_ROWS 8
#define XBRAID_COLUMNS 4
#include "dense_impl.hpp"
