// The kernels with the instructions that every processor of the architecture has.

#define XBRAID_TABLE baseline
#define XBRAID_NAME "baseline"
#define XBRAID_MAX_WIDTH 16
#define XBRAID_BYTES 16
#define XBRAID_ROWS 4
#define XBRAID_COLUMNS 2
#include "dense_impl.hpp"
