// How a kernel becomes known to torch: one line at the end of an op's file,
// DAGCORE_REGISTER(CPU, "op", function).
#pragma once

#include <torch/csrc/stable/library.h>

// The dispatch key of the kernels in csrc/cuda: another one where they are compiled for the host.
#ifndef DAGCORE_CUDA_KEY
#define DAGCORE_CUDA_KEY CUDA
#endif

// The argument expands before torch's macro makes a name of it.
#define DAGCORE_IMPLEMENTATIONS(key, library) STABLE_TORCH_LIBRARY_IMPL(dagcore, key, library)

#define DAGCORE_REGISTER(key, op, function) \
  DAGCORE_IMPLEMENTATIONS(key, library) { library.impl(op, TORCH_BOX(&function)); }
