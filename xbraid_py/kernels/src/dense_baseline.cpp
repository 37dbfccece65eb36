// The kernels with the instructions that every processor of the architecture has.

#define XBRAID_TABLE baseline
#define XBRAID_NAME "baseline"
#define XBRAID_MAX_WIDTH 16
#define XBRAID_BYTES 16
#if defined(__aarch64__)  // with 32 registers, as many as AVX-512 has
#define XBRAID_ROWS 8
#define XBRAID_COLUMNS 4
#else
#define XBRAID_ROWS 4
#define XBRAID_COLUMNS 2
#endif
#include "dense_impl.hpp"
