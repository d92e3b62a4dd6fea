/* The part of NVIDIA's driver interface that Triton calls, without a GPU: it loads nothing, runs nothing and
 * keeps the last launch. Device 0 is an H100, device 1 an A100.
 *
 * What a kernel takes stands in its module; the real driver reads it there. Here whoever reads the PTX
 * declares it (recording_declare) between the loading and the first launch.
 */
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

enum { NAME = 128, PARAMETERS = 512, BYTES = 4096, SOME_REGISTERS = 64, SOME_CONTEXT = 1 };

struct function {
  char name[NAME];
  unsigned count;            /* of parameters; 0 until they are declared */
  unsigned size[PARAMETERS]; /* bytes of each */
};

struct launch {
  unsigned long long number; /* launches so far, this one among them */
  struct function *function;
  unsigned long long stream;
  unsigned grid[3], block[3];
  unsigned shared;     /* bytes of dynamic shared memory */
  unsigned attributes; /* clusters, cooperative grids and the like */
  unsigned bytes;      /* of arguments, one after the other, without gaps */
  unsigned char arguments[BYTES];
};

struct launch recording_last;

CUresult recording_declare(struct function *function, unsigned count, const unsigned *size) {
  if (count > PARAMETERS) return CUDA_ERROR_INVALID_VALUE;
  function->count = count;
  memcpy(function->size, size, count * sizeof *size);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **arguments, void **extra) {
  struct function *function = (struct function *)handle;
  struct launch next = {
      .number = recording_last.number + 1,
      .function = function,
      .stream = (unsigned long long)config->hStream,
      .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
      .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
      .shared = config->sharedMemBytes,
      .attributes = config->numAttrs,
  };
  if (function->count == 0 || extra != NULL) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < function->count; i++) {
    if (next.bytes + function->size[i] > BYTES) return CUDA_ERROR_INVALID_VALUE;
    memcpy(next.arguments + next.bytes, arguments[i], function->size[i]);
    next.bytes += function->size[i];
  }
  recording_last = next;
  return CUDA_SUCCESS;
}

/* Modules and functions. */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  /* A cubin is an ELF file. */
  if (memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module, const char *name) {
  /* Handles live as long as the process: a launcher may keep them. */
  struct function *function = calloc(1, sizeof *function);
  if (function == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
  strncpy(function->name, name, NAME - 1);
  *handle = (CUfunction)function;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? SOME_REGISTERS
           : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* Devices and contexts. Data-sheet numbers; rates in kHz. */

static int attribute(CUdevice_attribute which, int a100) {
  switch (which) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return a100 ? 8 : 9;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return a100 ? 108 : 132;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return (a100 ? 163 : 227) << 10;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return (a100 ? 164 : 228) << 10;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 65536;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return a100 ? 1410000 : 1980000;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return a100 ? 1215000 : 2619000;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
  default: return -1;
  }
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 || ordinal == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = attribute(which, device == 1);
  return *value < 0 ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)SOME_CONTEXT;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

/* Every address counts as one of the device's. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = "refused by the recording driver";
  return CUDA_SUCCESS;
}

/* Named by Triton's module, never called by our launches. */
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDriverGetVersion(int *version) { return CUDA_ERROR_NOT_SUPPORTED; }
