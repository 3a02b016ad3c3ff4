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

// --- memory that several GPUs map: host memory, which every mapping of a handle shares ---

#include <stdlib.h>
#include <unistd.h>
#include <fcntl.h>
typedef struct { int type, handle_types; struct { int type, id; } location; void *win32; } Properties;
typedef struct { struct { int type, id; } location; int flags; } Access;

static char *reserved;
static int mode = 1;

int cuMemGetAllocationGranularity(size_t *bytes, const Properties *p, int option) {
    printf("granularity of type %d on %d.%d handles %d option %d\n", p->type, p->location.type, p->location.id,
           p->handle_types, option);
    *bytes = 4096;
    return 0;
}
int cuMemCreate(uint64_t *handle, size_t bytes, const Properties *p, uint64_t flags) {
    printf("create %zu on %d.%d handles %d\n", bytes, p->location.type, p->location.id, p->handle_types);
    *handle = 0xA11;
    return 0;
}
int cuMemExportToShareableHandle(void *out, uint64_t handle, int type, uint64_t flags) {
    *(int *)out = open("/dev/null", O_RDONLY);
    printf("export %lx as %d\n", handle, type);
    return 0;
}
int cuMemImportFromShareableHandle(uint64_t *handle, void *descriptor, int type) {
    printf("import %d as %d\n", (int)(intptr_t)descriptor > 2, type);
    *handle = 0xB22;
    return 0;
}
int cuMemAddressReserve(uint64_t *address, size_t bytes, size_t alignment, uint64_t wanted, uint64_t flags) {
    reserved = aligned_alloc(4096, bytes);
    *address = (uint64_t)reserved;
    return 0;
}
int cuMemMap(uint64_t address, size_t bytes, size_t offset, uint64_t handle, uint64_t flags) {
    printf("map %d %zu of %lx\n", address == (uint64_t)reserved, bytes, handle);
    return 0;
}
int cuMemSetAccess(uint64_t address, size_t bytes, const Access *access, size_t count) {
    for (size_t i = 0; i < count; i++)
        printf("access %zu for %d.%d flags %d\n", bytes, access[i].location.type, access[i].location.id, access[i].flags);
    return 0;
}
int cuMemUnmap(uint64_t address, size_t bytes) { printf("unmap %zu\n", bytes); return 0; }
int cuMemAddressFree(uint64_t address, size_t bytes) { free((void *)address); return 0; }
int cuMemRelease(uint64_t handle) { printf("release %lx\n", handle); return 0; }
int cuMemAlloc(uint64_t *address, size_t bytes) { *address = (uint64_t)aligned_alloc(4096, bytes); return 0; }
int cuMemFree(uint64_t address) { free((void *)address); printf("free\n"); return 0; }
int cuMemcpyHtoDAsync(uint64_t to, const void *from, size_t bytes, void *stream) {
    printf("write %zu stream %p mode %d\n", bytes, stream, mode);
    memcpy((void *)to, from, bytes);
    return 0;
}
int cuMemcpyDtoH(void *to, uint64_t from, size_t bytes) { memcpy(to, (void *)from, bytes); return 0; }
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *stream) {
    memset((void *)to, value, bytes);
    return 0;
}
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)(0x50L + flags); return 0; }
int cuStreamSynchronize(void *stream) { return 0; }
int cuStreamDestroy(void *stream) { printf("end of %p\n", stream); return 0; }
int cuThreadExchangeStreamCaptureMode(int *other) { int before = mode; mode = *other; *other = before; return 0; }
int cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    printf("host %zu flags %u\n", bytes, flags);
    *out = malloc(bytes);
    return 0;
}
int cuMemHostGetDevicePointer(uint64_t *address, void *host, unsigned flags) { *address = (uint64_t)host; return 0; }
int cuDeviceCanAccessPeer(int *can, int device, int peer) { *can = peer == 1; return 0; }
int cuFuncLoad(void *f) { printf("loaded %d\n", f == &function); return 0; }
int cuLaunchCooperativeKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, void *stream, void **args) {
    printf("cooperative %d grid %u %u %u rank %d of %d\n", f == &function, x, y, z, *(int *)args[5], *(int *)args[6]);
    fflush(stdout);
    return 0;
}
int cuEventCreate(void **event, unsigned flags) { *event = (void *)(0x60L + flags); return 0; }
int cuEventDestroy(void *event) { printf("end of %p\n", event); return 0; }
int cuEventRecord(void *event, void *stream) { printf("record %p on %p\n", event, stream); return 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { printf("%p waits for %p\n", stream, event); return 0; }
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    printf("copy %zu over %zu on %p\n", bytes, to - from, stream);
    memcpy((void *)to, (void *)from, bytes);
    return 0;
}
