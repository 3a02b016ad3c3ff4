// A libcuda.so.1 that does nothing but report, on standard output, what the bindings hand it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char context, module, function;

int cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags, int *found) {
    *address = dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), name);
    if (found) *found = *address ? 0 : 1;
    return *address ? 0 : 500;
}
int cuGetProcAddress(const char *name, void **address, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, address, version, flags, NULL);
}
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA Stub", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 1024; return 0; }
int cuDeviceTotalMem(size_t *bytes, int device) { return cuDeviceTotalMem_v2(bytes, device); }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 75: *value = 9; break;        // compute capability
    case 76: *value = 0; break;
    case 16: *value = 132; break;      // multiprocessors
    case 97: *value = 232448; break;   // shared memory, opt-in
    default: *value = 0;
    }
    return 0;
}
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = &context; return 0; }
int cuCtxGetCurrent(void **out) { *out = &context; return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuModuleLoadData(void **out, const char *image) { *out = &module; printf("load %s\n", image + 1); return 0; }
int cuModuleGetFunction(void **out, void *from, const char *name) {
    *out = &function;
    printf("function %s %d\n", name, from == &module);
    return 0;
}
int cuFuncSetAttribute(void *f, int attribute, int value) { printf("attribute %d %d\n", attribute, value); return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *f, int threads, size_t shared) {
    *blocks = 3;
    return 0;
}
int cuTensorMapEncodeTiled(unsigned char *map, int type, unsigned rank, void *address, const uint64_t *dims,
                           const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave,
                           int swizzle, int l2, int fill) {
    memset(map, 0x5A, 128);
    printf("map type %d rank %u at %p dims %lu %lu stride %lu box %u %u steps %u %u options %d %d %d %d\n", type, rank,
           address, dims[0], dims[1], strides[0], box[0], box[1], steps[0], steps[1], interleave, swizzle, l2, fill);
    return 0;
}
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **args, void **extra) {
    const unsigned char *map = args[6];
    printf("launch %d grid %u %u %u block %u %u %u shared %u stream %p args %p %d %f %d %d %d map %02x %02x %d\n",
           f == &function, x, y, z, bx, by, bz, shared, stream, *(void **)args[0], *(int *)args[1], *(float *)args[2],
           *(int *)args[3], *(int *)args[4], *(int *)args[5], map[0], map[127], (int)((uintptr_t)map % 64));
    fflush(stdout);
    return 0;
}
