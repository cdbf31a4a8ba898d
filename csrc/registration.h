// Registers a kernel with torch by one line at the end of an op's file: DAGCORE_REGISTER(CPU, "op",
// function).
#pragma once

#include <torch/csrc/stable/library.h>

// Where the kernels of csrc/cuda are registered; another place if they are compiled for the host.
#ifndef DAGCORE_CUDA_KEY
#define DAGCORE_CUDA_KEY CUDA
#endif
#ifndef DAGCORE_LIBRARY
#define DAGCORE_LIBRARY dagcore
#endif

// Expands the arguments before torch's macro builds names from them.
#define DAGCORE_IMPLEMENTATIONS(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)

#define DAGCORE_REGISTER(key, op, function) \
  DAGCORE_IMPLEMENTATIONS(DAGCORE_LIBRARY, key, library) { library.impl(op, TORCH_BOX(&function)); }
