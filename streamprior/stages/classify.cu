// Counts -> classes: what classify.py and features.py do row by row, a tile of the frame for each block of threads.
//
// In front of this stands a typedef that says what a count_t is. Frames lie along blockIdx.y, tiles along blockIdx.x.
// A tile comes into shared memory with the REACH pixels around it, once; the stencils then look there. Blurring goes down the columns first
// and along the rows after it, as do the sums over 5 x 5, in the order in which the CPU adds them.
//
// No sum depends on which thread comes first: a call repeated gives the same bits. Nothing here needs a header, so that NVRTC alone compiles it.

#define THREADS 256
#define REACH 8     // of the Gaussian, as in features.py
#define ACROSS 32   // pixels of a tile: a warp's width, so that a row of it is one access
#define DOWN 16
#define WIDE (ACROSS + 2 * REACH)
#define HIGH (DOWN + 2 * REACH)
#define FEATURES 9
#define FORM (FEATURES + 1)  // an affine form: its weights and its offset
#define NOT_MEASURED 255     // records.NOT_MEASURED

typedef unsigned char byte;

// Sum over the threads of a block, in an order that never changes; thread 0 has it. Every thread of the block must come here.
__device__ double block_sum(double value) {
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    double sum = sums[0];
    __syncthreads();
    return sum;
}

// Where pixel i beyond an edge is taken from: the edge pixel is repeated (scipy's "reflect").
__device__ int mirrored(int i, int length) {
    int folded = (i % (2 * length) + 2 * length) % (2 * length);
    return folded < length ? folded : 2 * length - 1 - folded;
}

// Photons on valid pixels and their number -> parts (frames, 2, blocks). valid : a map for each frame, or one for all with valid_apart 0.
extern "C" __global__ void add_photons(const count_t *counts, const byte *valid, int valid_apart, double *parts, int pixels) {
    long long first = (long long)blockIdx.y * pixels, map = (long long)blockIdx.y * valid_apart;
    double photons = 0.0;
    int measured = 0;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < pixels; i += gridDim.x * THREADS) {
        if (!valid[map + i]) continue;
        photons += (float)counts[first + i];
        measured += 1;
    }
    photons = block_sum(photons);
    double all = block_sum(measured);
    if (threadIdx.x != 0) return;
    parts[(long long)blockIdx.y * 2 * gridDim.x + blockIdx.x] = photons;
    parts[((long long)blockIdx.y * 2 + 1) * gridDim.x + blockIdx.x] = all;
}

// The same added up -> scales (frames, 2): what a frame is multiplied with, normaliser / mean photons on valid pixels, 1 for a dark frame; and
// its valid pixels.
extern "C" __global__ void find_scales(const double *parts, double normaliser, double *scales, int blocks) {
    const double *mine = parts + (long long)blockIdx.x * 2 * blocks;
    double photons = 0.0, measured = 0.0;
    for (int i = threadIdx.x; i < blocks; i += THREADS) {
        photons += mine[i];
        measured += mine[blocks + i];
    }
    photons = block_sum(photons);
    measured = block_sum(measured);
    if (threadIdx.x != 0) return;
    scales[2 * blockIdx.x] = photons > 0.0 && normaliser > 0.0 ? (float)(normaliser * measured / photons) : 1.0f;
    scales[2 * blockIdx.x + 1] = measured;
}

// log(1 + value) as features.py has it: exponent by its bits, mantissa by the polynomial of Abramowitz & Stegun 4.1.44.
__device__ float log_of(float value) {
    unsigned bits = __float_as_uint(1.0f + (value > 0.0f ? value : 0.0f));
    float exponent = (float)((int)(bits >> 23) - 127), m = __uint_as_float((bits & 0x7FFFFFu) | 0x3F800000u) - 1.0f;
    float p = -0.0064535442f * m + 0.0360884937f;
    p = p * m - 0.0953293897f;
    p = p * m + 0.1676540711f;
    p = p * m - 0.2407338084f;
    p = p * m + 0.3317990258f;
    p = p * m - 0.4998741238f;
    p = p * m + 0.9999964239f;
    return exponent * 0.69314718f + p * m;
}

// Sums down the columns of a tile, for each of its rows: the Gaussian's, the counts' and their squares' over five.
struct Columns {
    float blurred[DOWN][WIDE], sum[DOWN][WIDE], squares[DOWN][WIDE];
};

__device__ void add_columns(const float (&tile)[HIGH][WIDE], Columns &columns, const float *taps) {
    for (int i = threadIdx.x; i < DOWN * WIDE; i += THREADS) {
        int y = i / WIDE, x = i % WIDE, c = y + REACH;
        float blurred = taps[0] * tile[c][x], sum = 0.0f, squares = 0.0f;
        for (int j = 1; j <= REACH; ++j) blurred += taps[j] * (tile[c - j][x] + tile[c + j][x]);
        for (int j = -2; j <= 2; ++j) {
            sum += tile[c + j][x];
            squares += tile[c + j][x] * tile[c + j][x];
        }
        columns.blurred[y][x] = blurred;
        columns.sum[y][x] = sum;
        columns.squares[y][x] = squares;
    }
}

// The nine features of pixel (y, x) of a tile but for the angle, in the order of prior.FEATURES. down, across : from the beam.
__device__ void find_features(const float (&tile)[HIGH][WIDE], const Columns &columns, const float *taps, int y, int x, float down, float across,
                              float (&feature)[FEATURES]) {
    int r = y + REACH, c = x + REACH;
    float here = tile[r][c], up = tile[r - 1][c], below = tile[r + 1][c], left = tile[r][c - 1], right = tile[r][c + 1];
    float cross = up + below + left + right, corners = tile[r - 1][c - 1] + tile[r - 1][c + 1] + tile[r + 1][c - 1] + tile[r + 1][c + 1];
    float sum = 0.0f, squares = 0.0f, blurred = taps[0] * columns.blurred[y][c];
    for (int j = -2; j <= 2; ++j) {
        sum += columns.sum[y][c + j];
        squares += columns.squares[y][c + j];
    }
    for (int j = 1; j <= REACH; ++j) blurred += taps[j] * (columns.blurred[y][c - j] + columns.blurred[y][c + j]);
    float mean = sum * (1.0f / 25.0f), spread = squares * (1.0f / 25.0f) - mean * mean;
    feature[0] = here;
    feature[1] = log_of(here);
    feature[2] = (corners + cross + here) * (1.0f / 9.0f);
    feature[3] = sqrtf(spread > 0.0f ? spread : 0.0f);
    feature[4] = cross - 4.0f * here;
    feature[5] = 0.5f * sqrtf((right - left) * (right - left) + (below - up) * (below - up));
    feature[6] = sqrtf(down * down + across * across);
    feature[8] = here - blurred;
}

__device__ float value_of(const float *form, const float (&feature)[FEATURES]) {
    float value = form[FEATURES];
    for (int f = 0; f < FEATURES; ++f) value += form[f] * feature[f];
    return value;
}

// Nearest centroid of a pixel, and its distance from it. forms : (classes + projections, FORM).
__device__ int nearest(const float *forms, int classes, int number, const float (&feature)[FEATURES], float &distance) {
    float least = value_of(forms, feature);
    int kept = 0;
    for (int k = 1; k < classes; ++k) {
        float score = value_of(forms + k * FORM, feature);
        kept = score < least ? k : kept;
        least = score < least ? score : least;
    }
    for (int p = classes; p < number; ++p) {
        float z = value_of(forms + p * FORM, feature);
        least += z * z;
    }
    distance = sqrtf(least > 0.0f ? least : 0.0f);
    return kept;
}

// Classes of a tile of every frame; sums : (frames, tiles), of the distances of its valid pixels. angle : (H, W), read where has_angle. The
// taps and the forms wait in shared memory behind each other.
extern "C" __global__ void classify_tiles(const count_t *counts, const byte *valid, int valid_apart, const double *scales, const float *taps,
                                          const float *forms, int classes, int number, const float *angle, int has_angle, byte *ids,
                                          double *sums, int height, int width) {
    extern __shared__ float tables[];
    __shared__ float tile[HIGH][WIDE];
    __shared__ Columns columns;
    int tiles = (width + ACROSS - 1) / ACROSS, top = blockIdx.x / tiles * DOWN, left = blockIdx.x % tiles * ACROSS;
    long long first = (long long)blockIdx.y * height * width, map = (long long)blockIdx.y * valid_apart;
    float scale = (float)scales[2 * blockIdx.y];
    for (int i = threadIdx.x; i < FEATURES + number * FORM; i += THREADS) tables[i] = i < FEATURES ? taps[i] : forms[i - FEATURES];
    for (int i = threadIdx.x; i < HIGH * WIDE; i += THREADS) {
        int y = mirrored(top - REACH + i / WIDE, height), x = mirrored(left - REACH + i % WIDE, width);
        tile[i / WIDE][i % WIDE] = (float)counts[first + (long long)y * width + x] * scale;
    }
    __syncthreads();
    add_columns(tile, columns, tables);
    __syncthreads();
    float total = 0.0f;
    for (int i = threadIdx.x; i < ACROSS * DOWN; i += THREADS) {
        int y = top + i / ACROSS, x = left + i % ACROSS;
        if (y >= height || x >= width) continue;
        long long pixel = (long long)y * width + x;
        float feature[FEATURES], distance;
        find_features(tile, columns, tables, i / ACROSS, i % ACROSS, y - height / 2, x - width / 2, feature);
        feature[7] = has_angle ? angle[pixel] : 0.0f;
        int kept = nearest(tables + FEATURES, classes, number, feature, distance);
        bool measured = valid[map + pixel] != 0;
        ids[first + pixel] = measured ? kept : NOT_MEASURED;
        total += measured ? distance : 0.0f;
    }
    double sum = block_sum(total);
    if (threadIdx.x == 0) sums[(long long)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// Mean distance of each frame's valid pixels; NaN without any.
extern "C" __global__ void find_means(const double *sums, const double *scales, float *means, int tiles) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < tiles; i += THREADS) sum += sums[(long long)blockIdx.x * tiles + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) means[blockIdx.x] = (float)(sum / scales[2 * blockIdx.x + 1]);
}
