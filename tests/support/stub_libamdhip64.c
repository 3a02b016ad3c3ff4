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
