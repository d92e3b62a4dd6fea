#pragma once

#include "auxkern.h"

// Numbers of a layer's result that differ from those of its pieces, and calls that were not refused;
// -1 if the layer was. `cache` is the type of keys and values.
int layer_differences(int32_t isa, int32_t threads, int32_t kind, int32_t cache, int64_t B, int64_t T);

// Columns of a cache that a layer before it does not ask for once, or asks for though nobody sees them.
int cache_columns_left_out();
