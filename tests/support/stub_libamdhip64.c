// A libamdhip64.so that does nothing but report, on standard output, what the bindings hand it.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char module, function;
static int current = 1;

// hipDeviceProp_tR0600 up to gcnArchName (hip/hip_runtime_api.h): only what lies at known places matters
typedef struct {
    char name[256], uuid[16], luid[8];
    unsigned luidDeviceNodeMask;
    size_t totalGlobalMem, sharedMemPerBlock;
    int regsPerBlock, warpSize;
    size_t memPitch;
    int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3], clockRate;
    size_t totalConstMem;
    int major, minor;
    size_t textureAlignment, texturePitchAlignment;
    int deviceOverlap, multiProcessorCount, kernelExecTimeoutEnabled, integrated, canMapHostMemory, computeMode;
    int textures[40];  // maxTexture1D to maxSurfaceCubemapLayered
    size_t surfaceAlignment;
    int concurrentKernels, ECCEnabled, pci[3], tccDriver, asyncEngineCount, unifiedAddressing, memoryClockRate;
    int memoryBusWidth, l2CacheSize, persistingL2, maxThreadsPerMultiProcessor, streamPriorities, globalL1, localL1;
    size_t sharedMemPerMultiprocessor;
    int regsPerMultiprocessor, managedMemory, isMultiGpuBoard, multiGpuBoardGroupID, hostNativeAtomic, ratio;
    int pageable, concurrentManaged, preemption, hostPointer, cooperative, cooperativeMulti;
    size_t sharedMemPerBlockOptin;
    int pageTables, directManaged, maxBlocks, accessPolicy;
    size_t reservedSharedMemPerBlock;
    int hostRegister, sparse, hostReadOnly, timeline, pools, rdma;
    unsigned rdmaOptions;
    int rdmaOrdering;
    unsigned poolHandles;
    int deferred, ipc, cluster, unified, reserved[63], hipReserved[32];
    char gcnArchName[256];
} Properties;

int hipInit(unsigned flags) { return 0; }
int hipGetDeviceCount(int *count) { *count = 2; return 0; }
int hipGetDevicePropertiesR0600(Properties *p, int device) {
    strcpy(p->name, "AMD Stub");
    strcpy(p->gcnArchName, "gfx942:sramecc+:xnack-");
    p->multiProcessorCount = 304;
    p->totalGlobalMem = 4096;
    return 0;
}
int hipGetDevice(int *device) { *device = current; return 0; }
int hipSetDevice(int device) { current = device; printf("device %d\n", device); return 0; }
int hipDeviceSynchronize(void) { printf("synchronize\n"); fflush(stdout); return 0; }
int hipModuleLoadData(void **out, const char *image) { *out = &module; printf("load %s\n", image + 1); return 0; }
int hipModuleGetFunction(void **out, void *from, const char *name) {
    *out = &function;
    printf("function %s %d\n", name, from == &module);
    return 0;
}
int hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *f, int threads, size_t shared) {
    *blocks = 2;
    return 0;
}
int hipModuleLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **args, void **extra) {
    printf("launch %d grid %u %u %u block %u %u %u shared %u stream %p args %p %d %f %d %d %d extra %p\n", f == &function,
           x, y, z, bx, by, bz, shared, stream, *(void **)args[0], *(int *)args[1], *(float *)args[2], *(int *)args[3],
           *(int *)args[4], *(int *)args[5], (void *)extra);
    fflush(stdout);
    return f == &function && bx > 1024 ? 701 : 0;
}

// --- memory that several GPUs map: host memory ---

#include <fcntl.h>
#include <stdlib.h>
typedef struct { int type, handle_types; struct { int type, id; } location; void *win32; int flags; } Allocation;
typedef struct { struct { int type, id; } location; int flags; } Access;

static char *reserved;

int hipMemGetAllocationGranularity(size_t *bytes, const Allocation *p, int option) {
    printf("granularity of type %x on %d.%d handles %d option %d\n", p->type, p->location.type, p->location.id,
           p->handle_types, option);
    *bytes = 4096;
    return 0;
}
int hipMemCreate(void **handle, size_t bytes, const Allocation *p, unsigned long long flags) {
    printf("create %zu on %d.%d handles %d\n", bytes, p->location.type, p->location.id, p->handle_types);
    *handle = (void *)0xA11;
    return 0;
}
int hipMemExportToShareableHandle(void *out, void *handle, int type, unsigned long long flags) {
    *(int *)out = open("/dev/null", O_RDONLY);
    printf("export %p as %d\n", handle, type);
    return 0;
}
int hipMemImportFromShareableHandle(void **handle, void *descriptor, int type) {
    printf("import %d as %d\n", (int)(intptr_t)descriptor > 2 && (intptr_t)descriptor < 1024, type);
    *handle = (void *)0xB22;
    return 0;
}
int hipMemAddressReserve(void **address, size_t bytes, size_t alignment, void *wanted, unsigned long long flags) {
    *address = reserved = aligned_alloc(4096, bytes);
    return 0;
}
int hipMemMap(void *address, size_t bytes, size_t offset, void *handle, unsigned long long flags) {
    printf("map %d %zu of %p\n", address == reserved, bytes, handle);
    return 0;
}
int hipMemSetAccess(void *address, size_t bytes, const Access *access, size_t count) {
    for (size_t i = 0; i < count; i++)
        printf("access %zu for %d.%d flags %d\n", bytes, access[i].location.type, access[i].location.id, access[i].flags);
    return 0;
}
int hipMemUnmap(void *address, size_t bytes) { printf("unmap %zu\n", bytes); return 0; }
int hipMemAddressFree(void *address, size_t bytes) { free(address); return 0; }
int hipMemRelease(void *handle) { printf("release %p\n", handle); return 0; }
int hipMalloc(void **address, size_t bytes) { *address = aligned_alloc(4096, bytes); return 0; }
int hipFree(void *address) { free(address); printf("free\n"); return 0; }
int hipMemcpyHtoD(void *to, const void *from, size_t bytes) {
    printf("write %zu\n", bytes);
    memcpy(to, from, bytes);
    return 0;
}
int hipMemcpyDtoH(void *to, void *from, size_t bytes) { memcpy(to, from, bytes); return 0; }
int hipMemsetD8(void *to, unsigned char value, size_t bytes) { memset(to, value, bytes); return 0; }
int hipHostMalloc(void **out, size_t bytes, unsigned flags) {
    printf("host %zu flags %x\n", bytes, flags);
    *out = malloc(bytes);
    return 0;
}
int hipHostGetDevicePointer(void **address, void *host, unsigned flags) { *address = host; return 0; }
int hipDeviceCanAccessPeer(int *can, int device, int peer) { *can = peer == 1; return 0; }
int hipModuleLaunchCooperativeKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                                     unsigned shared, void *stream, void **args) {
    printf("cooperative %d grid %u %u %u rank %d of %d\n", f == &function, x, y, z, *(int *)args[5], *(int *)args[6]);
    fflush(stdout);
    return 0;
}
int hipStreamCreateWithFlags(void **stream, unsigned flags) { *stream = (void *)(0x50L + flags); return 0; }
int hipStreamDestroy(void *stream) { printf("end of %p\n", stream); return 0; }
int hipEventDestroy(void *event) { printf("end of %p\n", event); return 0; }
int hipEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)(0x60L + flags); return 0; }
int hipEventRecord(void *event, void *stream) { printf("record %p on %p\n", event, stream); return 0; }
int hipStreamWaitEvent(void *stream, void *event, unsigned flags) { printf("%p waits for %p\n", stream, event); return 0; }
int hipMemcpyAsync(char *to, char *from, size_t bytes, int kind, void *stream) {
    printf("copy %zu over %zu on %p\n", bytes, to - from, stream);
    memcpy(to, from, bytes);
    return kind == 4 ? 0 : 1;
}
