// A launch of frames and the canvas under their probes -> the canvas after them: what a card computes between two transforms.
//
// The formulas are those of kernels.py, where they are explained. Frames lie along blockIdx.y, the pixels of a frame along blockIdx.x and
// threadIdx.x, so that neighbouring threads touch neighbouring addresses. `first` is the place of the launch's first frame in what came
// with the call (slots, corners, targets, trust, partials); a field's place counts from the launch. Complex numbers are float2.
//
// No sum depends on which thread comes first: a call repeated gives the same bits. Nothing here needs a header, so that NVRTC alone compiles it.

#define THREADS 256  // a multiple of the warp; eight such blocks fill a multiprocessor of an A100, H100 or H200

struct Place {
    int pixel, y, x;
    bool inside;
};

__device__ Place place(int height, int width) {
    int pixel = blockIdx.x * THREADS + threadIdx.x;
    return {pixel, pixel / width, pixel % width, pixel < height * width};
}

__device__ float2 times(float2 a, float2 b) {
    return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

// gained += conj(adjoint) (field - probe object)
__device__ void add_residual(float2 adjoint, float2 probe, float2 object, float2 field, float2 &gained) {
    float2 predicted = times(probe, object);
    float real = field.x - predicted.x, imaginary = field.y - predicted.y;
    gained.x += adjoint.x * real + adjoint.y * imaginary;
    gained.y += adjoint.x * imaginary - adjoint.y * real;
}

// Sum over the threads of a block, in an order that never changes; thread 0 has it. Every thread of the block must come here.
__device__ double block_sum(double value) {
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];  // no barrier after it: in the next sum only thread 0 writes here
}

// Where a canvas keeps what lies under a pixel of a frame.
__device__ long long under(const int *corners, int frame, Place at, int columns) {
    return (long long)(corners[2 * frame] + at.y) * columns + corners[2 * frame + 1] + at.x;
}

__device__ void multiply(const float2 *probe, float2 object, float2 *psi, Place at, int modes, int plane) {
    for (int m = 0; m < modes; ++m) psi[(long long)m * plane + at.pixel] = times(probe[(long long)m * plane + at.pixel], object);
}

// field = probe times the window of the image, for each mode. slots : (B,); corners : (B, 2); probes : (S, M, H, W); field : (b, M, H, W).
extern "C" __global__ void illuminate(int first, const int *slots, const int *corners, const float2 *probes, const float2 *image, int columns,
                                      float2 *field, int modes, int height, int width) {
    Place at = place(height, width);
    int frame = first + blockIdx.y, plane = height * width;
    if (!at.inside) return;
    float2 object = image[under(corners, frame, at, columns)];
    multiply(probes + (long long)slots[frame] * modes * plane, object, field + (long long)blockIdx.y * modes * plane, at, modes, plane);
}

// The same, of a frame's own patch. patch : (b, H, W).
extern "C" __global__ void illuminate_patch(int first, const int *slots, const float2 *probes, const float2 *patch, float2 *field, int modes,
                                            int height, int width) {
    Place at = place(height, width);
    int frame = first + blockIdx.y, plane = height * width;
    if (!at.inside) return;
    float2 object = patch[(long long)blockIdx.y * plane + at.pixel];
    multiply(probes + (long long)slots[frame] * modes * plane, object, field + (long long)blockIdx.y * modes * plane, at, modes, plane);
}

// P_M for incoherent modes, in place, with the factor that the way back needs. targets : (B, H, W); trust : (B, H, W), or one for all with
// trust_apart 0. misfit : sum (modulus - target)^2 of each block of threads, frames `apart` doubles from each other.
extern "C" __global__ void constrain(int first, const float *targets, const float *trust, int trust_apart, float2 *field, double *misfit,
                                     int apart, int modes, int height, int width) {
    Place at = place(height, width);
    int frame = first + blockIdx.y, plane = height * width;
    float off = 0.0f;
    if (at.inside) {
        float2 *line = field + (long long)blockIdx.y * modes * plane + at.pixel;
        float wanted = targets[(long long)frame * plane + at.pixel], belief = trust[(long long)frame * trust_apart + at.pixel];
        float intensity = 0.0f;
        for (int m = 0; m < modes; ++m) {
            float2 one = line[(long long)m * plane];
            intensity += one.x * one.x + one.y * one.y;
        }
        float modulus = sqrtf(intensity), factor = 1.0f;
        if (wanted >= 0.0f) {
            off = modulus - wanted;
            factor += belief * (wanted / (modulus == 0.0f ? 1.0f : modulus) - 1.0f);
        }
        factor *= 1.0f / (float)plane;
        for (int m = 0; m < modes; ++m) {
            line[(long long)m * plane].x *= factor;
            line[(long long)m * plane].y *= factor;
        }
    }
    double sum = block_sum((double)off * off);
    if (threadIdx.x == 0) misfit[(long long)frame * apart + blockIdx.x] = sum;
}

// One pixel after the proximal step; own becomes the probe's intensity there.
__device__ float2 stepped(const float2 *probe, const float2 *field, float2 old, float had, float weight, float memory, int modes, int plane,
                          float &own) {
    float2 gained = make_float2(0.0f, 0.0f);
    own = 0.0f;
    for (int m = 0; m < modes; ++m) {
        float2 light = probe[(long long)m * plane];
        own += light.x * light.x + light.y * light.y;
        add_residual(light, light, old, field[(long long)m * plane], gained);
    }
    float share = 1.0f / (own + weight + memory * had);
    return make_float2(old.x + gained.x * share, old.y + gained.y * share);
}

// The step of a frame that goes on by itself: into its patch.
extern "C" __global__ void step_patch(int first, const int *slots, const int *corners, const float2 *probes, const float2 *image,
                                      const float *light, int columns, const float2 *field, float2 *patch, float weight, float memory,
                                      int modes, int height, int width) {
    Place at = place(height, width);
    int frame = first + blockIdx.y, plane = height * width;
    if (!at.inside) return;
    long long here = under(corners, frame, at, columns);
    const float2 *probe = probes + (long long)slots[frame] * modes * plane + at.pixel;
    const float2 *arrived = field + (long long)blockIdx.y * modes * plane + at.pixel;
    float own;
    patch[(long long)blockIdx.y * plane + at.pixel] = stepped(probe, arrived, image[here], light[here], weight, memory, modes, plane, own);
}

// A frame's last step, into the image, and its light, `lit` times. The windows of a launch do not overlap, so plain stores will do. seen and
// everywhere : the probe's light where there was more than `dim` before, and all of it, as `misfit` in `constrain`.
extern "C" __global__ void step_canvas(int first, const int *slots, const int *corners, const float2 *probes, float2 *image, float *light,
                                       int columns, const float2 *field, float weight, float memory, float dim, float lit, double *seen,
                                       double *everywhere, int apart, int modes, int height, int width) {
    Place at = place(height, width);
    int frame = first + blockIdx.y, plane = height * width;
    float own = 0.0f, had = 0.0f;
    if (at.inside) {
        long long here = under(corners, frame, at, columns);
        const float2 *probe = probes + (long long)slots[frame] * modes * plane + at.pixel;
        const float2 *arrived = field + (long long)blockIdx.y * modes * plane + at.pixel;
        had = light[here];
        image[here] = stepped(probe, arrived, image[here], had, weight, memory, modes, plane, own);
        light[here] = had + lit * own;
    }
    double part = block_sum(had > dim ? (double)own : 0.0), all = block_sum((double)own);
    if (threadIdx.x == 0) {
        seen[(long long)frame * apart + blockIdx.x] = part;
        everywhere[(long long)frame * apart + blockIdx.x] = all;
    }
}

// gradient += conj(object) (field - probe object), dose += |object|^2. Modes lie along blockIdx.y; a thread takes the frames of the launch one
// after another, as several may have the same slot. gradient : (S, M, H, W); dose : (H, W).
extern "C" __global__ void compare_probe(int first, int frames, const int *slots, const int *corners, const float2 *probes,
                                         const float2 *image, int columns, const float2 *field, float2 *gradient, float *dose, int modes,
                                         int height, int width) {
    Place at = place(height, width);
    int plane = height * width, m = blockIdx.y;
    if (!at.inside) return;
    float brightness = 0.0f;
    for (int b = 0; b < frames; ++b) {
        long long pixel = ((long long)slots[first + b] * modes + m) * plane + at.pixel;
        float2 object = image[under(corners, first + b, at, columns)];
        add_residual(object, probes[pixel], object, field[((long long)b * modes + m) * plane + at.pixel], gradient[pixel]);
        brightness += object.x * object.x + object.y * object.y;
    }
    if (m == 0) dose[at.pixel] += brightness;
}

// Every frame's part of the overlap projection: total += conj(probe) (field - probe image), light += |probe|^2. The pixels are those of the
// canvas from (top, left) on, (rows, across) of them; each asks every frame of the launch whether it lies under its window, in their order.
extern "C" __global__ void gather(int first, int frames, const int *slots, const int *corners, const float2 *probes, const float2 *image,
                                  int columns, const float2 *field, float2 *total, float *light, int top, int left, int rows, int across,
                                  int modes, int height, int width) {
    Place at = place(rows, across);
    int plane = height * width;
    if (!at.inside) return;
    int row = top + at.y, column = left + at.x;
    long long here = (long long)row * columns + column;
    float2 object = image[here], gained = total[here];
    float had = light[here];
    for (int b = 0; b < frames; ++b) {
        int y = row - corners[2 * (first + b)], x = column - corners[2 * (first + b) + 1];
        if (y < 0 || y >= height || x < 0 || x >= width) continue;
        int pixel = y * width + x;
        for (int m = 0; m < modes; ++m) {
            float2 probe = probes[((long long)slots[first + b] * modes + m) * plane + pixel];
            add_residual(probe, probe, object, field[((long long)b * modes + m) * plane + pixel], gained);
            had += probe.x * probe.x + probe.y * probe.y;
        }
    }
    total[here] = gained;
    light[here] = had;
}

// What the blocks of threads left -> its sum. partials : (items, blocks); sums : (items,).
extern "C" __global__ void add_up(const double *partials, double *sums, int blocks) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < blocks; i += THREADS) sum += partials[(long long)blockIdx.x * blocks + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
