/* A driver without a GPU, for tests of what is asked of it: it keeps count, and computes nothing.

   Compiled as libcuda.so.1 and loaded before cuda.bindings, it stands in for NVIDIA's. Two devices of
   132 multiprocessors, a primary context each, and whatever green contexts a test makes. */

#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct Context {
    u64 id;
    int device, multiprocessors;
} Context;
typedef struct Library {
    int unloaded;
    long settings[32];
} Library;

enum { OK, INVALID_VALUE = 1, INVALID_CONTEXT = 201, CAPTURE_UNSUPPORTED = 900, TOO_LARGE = 720 };

static Context primary[2] = {{1, 0, 132}, {2, 1, 132}};
static u64 last_id = 2;
static __thread Context* current;

/* What tests read and set. */
int fake_version = 13000, fake_capturing, fake_relaxed = 1;
int loads, unloads, launches, synchronizations, recordings, graph_launches, loads_of_functions;
int bad_launches, memsets;
int replies_of_clusters = 1;
/* Of the last launch: grid, threads, shared memory, a bit for each attribute, CTAs of a cluster; and of
   its first arguments, as many as a test wants, two words each. */
int last_grid, last_threads, last_shared, last_attributes, last_cluster;
int arguments_wanted;
long long last_arguments[64];

void* fake_green_context(int device, int multiprocessors) {
    Context* made = calloc(1, sizeof *made);
    *made = (Context){++last_id, device, multiprocessors};
    return made;
}
void* fake_current(void) { return current; }
void fake_set_current(void* context) { current = context; }
void* fake_primary(int device) { return &primary[device]; }

static int version(int* out) { *out = fake_version; return OK; }
static int device_get(int* out, int ordinal) { *out = ordinal; return OK; }
static int device_count(int* out) { *out = 2; return OK; }
static int device_attribute(int* out, int attribute, int device) {
    /* Compute capability 9.0, 132 multiprocessors. */
    *out = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1;
    return OK;
}
static int retain(void** out, int device) { *out = &primary[device]; return OK; }
static int get_current(void** out) { *out = current; return OK; }
static int set_current(void* context) { current = context; return OK; }
static int context_device(int* out) {
    if (!current) return INVALID_CONTEXT;
    *out = current->device;
    return OK;
}
static int context_id(Context* context, u64* out) {
    if (!context) context = current;
    if (!context) return INVALID_CONTEXT;
    *out = context->id;
    return OK;
}
static int context_resource(Context* context, char* out, int kind) {
    /* CUdevResource: its type, 92 bytes of padding, then the number of multiprocessors. */
    memset(out, 0, 144);
    memcpy(out, &kind, sizeof kind);
    memcpy(out + 96, &context->multiprocessors, sizeof(int));
    return OK;
}
/* A stream is 0, the driver's own handles 1 and 2, or the address of a pointer to its context. */
static int stream_context(Context*** stream, Context** out) {
    *out = (u64)stream <= 2 ? current : *stream;
    return *out ? OK : INVALID_CONTEXT;
}
static int stream_create(Context*** out, unsigned flags) {
    *out = malloc(sizeof(Context*));
    **out = current;
    return OK;
}
static int stream_destroy(Context** stream) { free(stream); return OK; }
static int synchronize(void) {
    if (fake_capturing) return CAPTURE_UNSUPPORTED;
    ++synchronizations;
    return OK;
}
static int exchange_mode(int* mode) {
    int before = fake_relaxed;
    fake_relaxed = *mode == 2;
    *mode = before ? 2 : 0;
    return OK;
}
static int load(Library** out, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
    ++loads;
    *out = calloc(1, sizeof **out);
    return OK;
}
static int unload(Library* library) {
    ++unloads;
    library->unloaded = 1; /* Never freed, so that a late launch is seen. */
    return OK;
}
static int get_kernel(Library** out, Library* library, const char* name) { *out = library; return OK; }
static int kernel_library(Library** out, Library* kernel) { *out = kernel; return OK; }
static int kernel_function(Library** out, Library* kernel) {
    ++loads_of_functions;
    *out = kernel;
    return OK;
}
static int kernel_set(int attribute, int value, Library* kernel, int device) {
    kernel->settings[attribute] = value;
    return OK;
}
typedef struct Config {
    unsigned grid[3], block[3], shared;
    void* stream;
    struct Attribute { int id; char pad[4]; union { unsigned dim[3]; int flag; char pad[64]; } value; } * attributes;
    unsigned count;
} Config;
static int launch(const Config* config, Library* kernel, void** arguments, void** extra) {
    ++launches;
    Context* context;
    if (kernel->unloaded) ++bad_launches;
    last_grid = config->grid[0], last_threads = config->block[0], last_shared = config->shared;
    last_attributes = last_cluster = 0;
    for (int i = 0; i < arguments_wanted; ++i) memcpy(last_arguments + 2 * i, arguments[i], 16);
    if (stream_context(config->stream, &context)) return ++bad_launches, INVALID_CONTEXT;
    for (unsigned i = 0; i < config->count; ++i) {
        last_attributes |= 1 << config->attributes[i].id;
        if (config->attributes[i].id == 4) last_cluster = config->attributes[i].value.dim[0];
        if (config->attributes[i].id == 2 && config->attributes[i].value.flag &&
            config->grid[0] > (unsigned)context->multiprocessors) {
            return ++bad_launches, TOO_LARGE;
        }
    }
    return OK;
}
static int blocks_a_multiprocessor(int* out) { *out = 1; return OK; }
static int active_clusters(int* out, Library* kernel, const Config* config) {
    Context* context;
    if (stream_context(config->stream, &context)) return INVALID_CONTEXT;
    *out = replies_of_clusters ? context->multiprocessors / config->attributes[0].value.dim[0] : 0;
    return OK;
}
static int begin_capture(void* stream, int mode) { ++recordings; return OK; }
static int end_capture(void* stream, void** graph) { if (graph) *graph = malloc(1); return OK; }
static int is_capturing(void* stream, int* status) {
    *status = fake_capturing;
    return OK;
}
static int capture_info(void* stream, int* status, u64* id, void** graph) {
    if (status) *status = 1;
    if (graph) *graph = malloc(1);
    return OK;
}
static int instantiate(void** out, void* graph, void* parameters) { *out = malloc(1); return OK; }
static int graph_launch(void* graph, void* stream) { ++graph_launches; return OK; }
static int set_words(unsigned* to, unsigned value, size_t count, void* stream) {
    ++memsets;
    for (size_t i = 0; i < count; ++i) to[i] = value;
    return OK;
}
static int anything(void) { return OK; }

static const struct { const char* name; void* function; } known[] = {
    {"cuDriverGetVersion", version}, {"cuDeviceGet", device_get}, {"cuDeviceGetCount", device_count},
    {"cuDeviceGetAttribute", device_attribute}, {"cuDevicePrimaryCtxRetain", retain},
    {"cuCtxGetCurrent", get_current}, {"cuCtxSetCurrent", set_current},
    {"cuCtxGetDevice", context_device}, {"cuCtxGetId", context_id},
    {"cuCtxGetDevResource", context_resource}, {"cuStreamGetCtx", stream_context},
    {"cuStreamCreate", stream_create}, {"cuStreamDestroy", stream_destroy},
    {"cuStreamIsCapturing", is_capturing}, {"cuStreamSynchronize", synchronize},
    {"cuCtxSynchronize", synchronize}, {"cuThreadExchangeStreamCaptureMode", exchange_mode},
    {"cuLibraryLoadData", load}, {"cuLibraryUnload", unload}, {"cuLibraryGetKernel", get_kernel},
    {"cuKernelGetLibrary", kernel_library}, {"cuKernelGetFunction", kernel_function},
    {"cuKernelSetAttribute", kernel_set}, {"cuLaunchKernelEx", launch},
    {"cuMemsetD32Async", set_words},
    {"cuOccupancyMaxActiveBlocksPerMultiprocessor", blocks_a_multiprocessor},
    {"cuOccupancyMaxActiveClusters", active_clusters}, {"cuStreamBeginCapture", begin_capture},
    {"cuStreamEndCapture", end_capture}, {"cuStreamGetCaptureInfo", capture_info},
    {"cuGraphInstantiateWithParams", instantiate}, {"cuGraphLaunch", graph_launch},
};

int cuGetProcAddress_v2(const char* name, void** out, int version, u64 flags, int* status) {
    *out = anything;
    for (unsigned i = 0; i < sizeof known / sizeof *known; ++i) {
        if (!strcmp(name, known[i].name)) *out = known[i].function;
    }
    if (status) *status = 0;
    return OK;
}
int cuGetProcAddress(const char* name, void** out, int version, u64 flags) {
    return cuGetProcAddress_v2(name, out, version, flags, 0);
}
int cuInit(unsigned flags) { return OK; }
