// Photons and starts -> objects: what a card computes between two transforms, and around them.
//
// The formulas are those of projections.py and refine.py, where they are explained. A launch holds frames (or arms of frames) one behind the
// other; every frame is computed by itself. Two kinds of kernels: those of an iteration have the pixels of a frame along blockIdx.x and the
// frames along blockIdx.y; all others give each frame one block of threads, blockIdx.x, so that a sum or a maximum over a frame needs no
// second launch. In the sample plane arrays are in FFT order; in the detector plane in whatever order the transform leaves them, which the
// tables `rows` and `columns` tell: the centred row and column that belong to a row and column here. A volume's planes lie below each other,
// (rows, width). Complex numbers are float2.
//
// No sum depends on which thread comes first: a call repeated gives the same bits. Nothing here needs a header, so that NVRTC alone compiles it.

#define THREADS 256  // a multiple of the warp; eight such blocks fill a multiprocessor of an A100, H100 or H200
#define EACH 4       // pixels that a thread of an iteration's kernels computes: fewer sums are left to add up
#define FINITE 3.402823466e+38f
#define ENDLESS 1.797693134862315e+308
#define INFINITE_BITS 0x7f800000u

typedef unsigned char byte;

// What is noted of every frame, a row of doubles; told_cuda.py reads it. From ERRORS on: the misfit before each iteration, and at the end.
enum { PHOTONS, PIXELS, FLAGS, KEPT, AREA, START_FLAGS, RESIDUAL, MODULI, FREE_SUM, FREE_PIXELS, ERRORS };

// records.Flag
enum { EMPTY = 1, NONFINITE = 2, NO_SUPPORT = 8 };

__device__ bool finite(float value) { return fabsf(value) <= FINITE; }  // false for NaN

// Sum over the threads of a block, in an order that never changes; all of them have it. Every thread of the block must come here.
__device__ double block_sum(double value) {
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    double sum = sums[0];
    __syncthreads();  // before the next sum overwrites it
    return sum;
}

// The same for the largest.
__device__ unsigned block_largest(unsigned value) {
    __shared__ unsigned values[THREADS];
    values[threadIdx.x] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half && values[threadIdx.x + half] > values[threadIdx.x]) values[threadIdx.x] = values[threadIdx.x + half];
        __syncthreads();
    }
    unsigned largest = values[0];
    __syncthreads();
    return largest;
}

// P_M of one pixel of an unscaled transform, with the factor that the way back needs; returns (modulus - wanted)^2. A pixel that was not
// measured (wanted below 0) stays as it is; a vanishing field takes phase 0.
__device__ float constrain(float2 &value, float wanted, float inverse) {
    float modulus = sqrtf(value.x * value.x + value.y * value.y);
    if (modulus == 0.0f && wanted >= 0.0f) {
        value = make_float2(wanted * inverse, 0.0f);
        return wanted * wanted;
    }
    float factor = (wanted >= 0.0f ? wanted / modulus : 1.0f) * inverse, off = wanted >= 0.0f ? modulus - wanted : 0.0f;
    value.x *= factor;
    value.y *= factor;
    return off * off;
}

// One pixel of the object after an iteration that found `found`. psi, anchor : where its pixel and the start's lie; read only where the rule
// asks for them, as memory is what an iteration waits for. old, fresh, weight : the rule.
__device__ float2 updated(float2 found, bool inside, const float2 *psi, const float2 *anchor, float old, float fresh, float weight) {
    float2 next = found;
    if (!inside) {
        next = make_float2(0.0f, 0.0f);
        if (old != 0.0f || fresh != 0.0f) next = make_float2(old * psi->x + fresh * found.x, old * psi->y + fresh * found.y);
    }
    if (weight > 0.0f) {
        float share = 1.0f / (1.0f + weight);
        next.x = (next.x + weight * anchor->x) * share;
        next.y = (next.y + weight * anchor->y) * share;
    }
    return next;
}

// A start's pixel, 0 where it is no number.
__device__ float2 begun(float2 start) { return make_float2(finite(start.x) ? start.x : 0.0f, finite(start.y) ? start.y : 0.0f); }

// Counts as they came -> target, sqrt(counts * pixels), the modulus that an unscaled transform must have, or -1 where nothing was measured;
// photons, pixels and flags of each frame. valid : a map for each frame, or one for all with valid_apart 0.
extern "C" __global__ void load_counts(const float *counts, const byte *valid, int valid_apart, const byte *held_out, const int *rows,
                                       const int *columns, float *target, double *numbers, int apart, int width, int pixels) {
    int frame = blockIdx.x;
    long long first = (long long)frame * pixels, map = (long long)frame * valid_apart;
    double photons = 0.0;
    int used = 0, unfit = 0;
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        int centred = rows[i / width] * width + columns[i % width];
        float value = counts[first + centred];
        bool fit = value >= 0.0f && value <= FINITE, measured = valid[map + centred] != 0;
        bool takes_part = fit && measured && !held_out[centred];
        target[first + i] = takes_part ? sqrtf(value * (float)pixels) : -1.0f;
        photons += takes_part ? (double)value : 0.0;
        used += takes_part;
        unfit += measured && !fit;
    }
    photons = block_sum(photons);
    double all_used = block_sum(used), all_unfit = block_sum(unfit);
    if (threadIdx.x != 0) return;
    double *mine = numbers + (long long)frame * apart;
    mine[PHOTONS] = photons;
    mine[PIXELS] = all_used;
    mine[FLAGS] = (all_unfit > 0.0 ? NONFINITE : 0) | (photons > 0.0 ? 0 : EMPTY);
}

// Centred starts and supports -> the same in FFT order; the support's area, and what is wrong with the start. owner : whose frame the object
// is of, noted in frame_of. support : a map for each object, or one for all with support_apart 0. The anchor is filled where there is a weight.
extern "C" __global__ void load_objects(const float2 *start, const byte *support, int support_apart, const int *owner, const int *rows,
                                        const int *columns, int *frame_of, float2 *psi, byte *inside, float2 *anchor, float weight,
                                        double *numbers, int apart, int width, int pixels) {
    int object = blockIdx.x;
    long long first = (long long)object * pixels, map = (long long)object * support_apart;
    int area = 0, unfit = 0;
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        int centred = rows[i / width] * width + columns[i % width];
        float2 value = start[first + centred];
        byte in = support[map + centred] != 0;
        inside[first + i] = in;
        psi[first + i] = begun(value);
        area += in;
        unfit += !finite(value.x) || !finite(value.y);
    }
    int all = (int)block_sum(area), all_unfit = (int)block_sum(unfit);
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        if (all == 0) psi[first + i] = make_float2(0.0f, 0.0f);
        if (weight > 0.0f) anchor[first + i] = psi[first + i];
    }
    if (threadIdx.x != 0) return;
    double *mine = numbers + (long long)object * apart;
    mine[AREA] = all;
    mine[START_FLAGS] = (all_unfit > 0 ? NONFINITE : 0) | (all > 0 ? 0 : NO_SUPPORT);
    mine[KEPT] = 0;
    frame_of[object] = owner[object];
}

// P_M of whole fields, in place. misfits : (objects, blocks) doubles, what each block of threads leaves of the sum of (modulus - target)^2.
extern "C" __global__ void project_modulus(float2 *field, const float *target, const int *frame_of, double *misfits, float inverse, int pixels) {
    long long first = (long long)blockIdx.y * pixels, wanted = (long long)frame_of[blockIdx.y] * pixels;
    float off = 0.0f;
    for (int k = 0; k < EACH; ++k) {
        int i = (blockIdx.x * EACH + k) * THREADS + threadIdx.x;
        if (i >= pixels) break;
        float2 value = field[first + i];
        off += constrain(value, target[wanted + i], inverse);
        field[first + i] = value;
    }
    double sum = block_sum(off);
    if (threadIdx.x == 0) misfits[(long long)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// psi <- the update rule's answer to a field.
extern "C" __global__ void update_object(float2 *psi, const float2 *field, const byte *inside, const float2 *anchor, float old, float fresh,
                                         float weight, int pixels) {
    long long first = (long long)blockIdx.y * pixels;
    for (int k = 0; k < EACH; ++k) {
        int i = (blockIdx.x * EACH + k) * THREADS + threadIdx.x;
        if (i >= pixels) break;
        psi[first + i] = updated(field[first + i], inside[first + i] != 0, psi + first + i, anchor + first + i, old, fresh, weight);
    }
}

// What the blocks left -> the misfits of `times` iterations from `done` on; a thread adds up one. misfits : (times, objects, blocks).
extern "C" __global__ void add_misfits(const double *misfits, double *numbers, int apart, int done, int times, int objects, int blocks) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= times * objects) return;
    double sum = 0.0;
    for (int block = 0; block < blocks; ++block) sum += misfits[(long long)i * blocks + block];
    numbers[(long long)(i % objects) * apart + ERRORS + done + i / objects] = sum;
}

// Numbers of the fields of finished objects: the last misfit, sum |t - k |field||, sum t; k is the least-squares scale.
extern "C" __global__ void score(const float2 *field, const float *target, const int *frame_of, double *numbers, int apart, int done, int pixels) {
    long long first = (long long)blockIdx.x * pixels, wanted = (long long)frame_of[blockIdx.x] * pixels;
    double squares = 0.0, across = 0.0, power = 0.0, moduli = 0.0, residual = 0.0;
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        double aim = target[wanted + i];
        if (aim < 0.0) continue;
        float2 value = field[first + i];
        double modulus = sqrtf(value.x * value.x + value.y * value.y);
        squares += (modulus - aim) * (modulus - aim);
        across += modulus * aim;
        power += modulus * modulus;
        moduli += aim;
    }
    squares = block_sum(squares);
    across = block_sum(across);
    power = block_sum(power);
    moduli = block_sum(moduli);
    float scale = power > 0.0 ? (float)(across / power) : 0.0f;
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        float aim = target[wanted + i];
        float2 value = field[first + i];
        if (aim >= 0.0f) residual += fabsf(aim - scale * sqrtf(value.x * value.x + value.y * value.y));
    }
    residual = block_sum(residual);
    if (threadIdx.x != 0) return;
    double *mine = numbers + (long long)blockIdx.x * apart;
    mine[ERRORS + done] = squares;
    mine[RESIDUAL] = residual;
    mine[MODULI] = moduli;
}

// Arms after their trial -> each frame's best in its place, as `load_objects` leaves a single one but `done` iterations on. Arms of frame f
// are objects first_arm[f] .. first_arm[f + 1] of the call, objects from `skipped` on of this round. trial : misfit of each arm of the call,
// NaN where it was not tried.
extern "C" __global__ void choose(const float2 *arm_psi, const byte *arm_inside, const float2 *arm_anchor, const double *arm_numbers,
                                  const int *first_arm, int skipped, int first_frame, float2 *psi, byte *inside, float2 *anchor, float weight,
                                  double *numbers, double *trial, int apart, int done, int pixels) {
    __shared__ int kept;
    int frame = first_frame + blockIdx.x, arms = first_arm[frame + 1] - first_arm[frame], first = first_arm[frame] - skipped;
    double *mine = numbers + (long long)frame * apart;
    if (threadIdx.x == 0) {
        double least = ENDLESS, none = 0.0;
        none /= none;  // NaN
        bool tried = mine[FLAGS] == 0.0;
        kept = -1;
        for (int arm = 0; arm < arms; ++arm) {
            const double *other = arm_numbers + (long long)(first + arm) * apart;
            double squares = tried && other[START_FLAGS] == 0.0 ? other[ERRORS + done] : none;
            trial[first_arm[frame] + arm] = squares;
            if (squares < least) {
                least = squares;
                kept = arm;
            }
        }
        bool found = kept >= 0;
        kept = found ? kept : 0;
        const double *best = arm_numbers + (long long)(first + kept) * apart;
        mine[KEPT] = kept;
        mine[AREA] = best[AREA];
        // Arms that could begin and came to no number are beyond what single precision can square.
        mine[START_FLAGS] = found || best[START_FLAGS] != 0.0 || !tried ? best[START_FLAGS] : (double)NONFINITE;
        for (int i = 0; i <= done; ++i) mine[ERRORS + i] = best[ERRORS + i];
    }
    __syncthreads();
    long long source = (long long)(first + kept) * pixels, goal = (long long)frame * pixels;
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        psi[goal + i] = arm_psi[source + i];
        inside[goal + i] = arm_inside[source + i];
        if (weight > 0.0f) anchor[goal + i] = arm_anchor[source + i];
    }
}

// |psi|, which a shrink-wrap blurs along each axis in turn.
extern "C" __global__ void take_modulus(const float2 *psi, float *modulus, int pixels) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= pixels) return;
    float2 value = psi[(long long)blockIdx.y * pixels + i];
    modulus[(long long)blockIdx.y * pixels + i] = sqrtf(value.x * value.x + value.y * value.y);
}

// A Gaussian along one axis of `length` pixels that lie `step` apart; the axis is a circle. taps : the centre and one side of it.
extern "C" __global__ void blur(const float *source, float *goal, const float *taps, int radius, int step, int length, int pixels) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= pixels) return;
    int place = i / step % length, at = ((place - radius) % length + length) % length;
    const float *line = source + (long long)blockIdx.y * pixels + i - place * step;
    float sum = 0.0f;
    for (int j = -radius; j <= radius; ++j) {
        sum += taps[j < 0 ? -j : j] * line[at * step];
        at = at + 1 == length ? 0 : at + 1;
    }
    goal[(long long)blockIdx.y * pixels + i] = sum;
}

// The value of which `rank` values (that one among them) are not smaller. Numbers from 0 on sort as their bits do: a digit of eight bits
// at a time, from the highest, by counting how many values with the digits so far have each next one.
__device__ unsigned ranked(const float *values, int number, int rank) {
    __shared__ int bins[256];
    __shared__ unsigned digits;
    __shared__ int wanted;
    if (threadIdx.x == 0) {
        digits = 0;
        wanted = rank;
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int bin = threadIdx.x; bin < 256; bin += THREADS) bins[bin] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < number; i += THREADS) {
            unsigned bits = __float_as_uint(values[i]);
            if (bits >> shift >> 8 == digits >> shift >> 8) atomicAdd(&bins[bits >> shift & 255], 1);  // whole numbers: any order will do
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255;
            for (; bin > 0 && bins[bin] < wanted; --bin) wanted -= bins[bin];
            digits |= (unsigned)bin << shift;
        }
        __syncthreads();
    }
    return digits;
}

// A blurred modulus -> the new support: what exceeds `threshold` of its maximum. The support's area stays between low and high times the
// first one's. An object that vanished, or is no number, keeps the support it has.
extern "C" __global__ void find_support(const float *smooth, float threshold, double low, double high, byte *inside, const double *numbers,
                                        int apart, int pixels) {
    const float *mine = smooth + (long long)blockIdx.x * pixels;
    byte *support = inside + (long long)blockIdx.x * pixels;
    unsigned peak = 0;
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        unsigned bits = __float_as_uint(mine[i]);
        peak = bits > peak ? bits : peak;  // of the bits, as NaN is larger than every number among them
    }
    peak = block_largest(peak);
    if (peak == 0 || peak >= INFINITE_BITS) return;
    float level = threshold * __uint_as_float(peak);
    int above = 0;
    for (int i = threadIdx.x; i < pixels; i += THREADS) above += mine[i] > level;
    above = (int)block_sum(above);
    double area = numbers[(long long)blockIdx.x * apart + AREA];
    int least = (int)fmin(fmax(1.0, rint(low * area)), (double)pixels), most = (int)fmin(fmax(1.0, rint(high * area)), (double)pixels);
    bool kept = least <= above && above <= most;
    unsigned bound = kept ? 0 : ranked(mine, pixels, above < least ? least : most);
    for (int i = threadIdx.x; i < pixels; i += THREADS) support[i] = kept ? mine[i] > level : __float_as_uint(mine[i]) >= bound;
}

// Poisson log-likelihood of the held-out pixels, its terms added up. places : of them in a field; centred : in the frame as it came.
extern "C" __global__ void judge_held_out(const float2 *field, const float *counts, const byte *valid, int valid_apart, const int *places,
                                          const int *centred, int held, double *numbers, int apart, int pixels) {
    long long first = (long long)blockIdx.x * pixels, map = (long long)blockIdx.x * valid_apart;
    double sum = 0.0;
    int used = 0;
    for (int i = threadIdx.x; i < held; i += THREADS) {
        if (!valid[map + centred[i]]) continue;
        float2 value = field[first + places[i]];
        double seen = counts[first + centred[i]], modelled = ((double)value.x * value.x + (double)value.y * value.y) / pixels;
        modelled = fmax(modelled, 1e-12);  // a model of exactly no photons would be infinitely wrong about one
        sum += modelled - seen + (seen > 0.0 ? seen * log(seen / modelled) : 0.0);
        used += 1;
    }
    sum = block_sum(sum);
    double all = block_sum(used);
    if (threadIdx.x != 0) return;
    numbers[(long long)blockIdx.x * apart + FREE_SUM] = sum;
    numbers[(long long)blockIdx.x * apart + FREE_PIXELS] = all;
}

// Objects in FFT order -> centred, and their row of numbers, as they leave. A frame that is flagged, or whose misfits are no numbers, gets
// its start back and the support it came with.
extern "C" __global__ void finish(const float2 *psi, const byte *inside, const float2 *start, const byte *support, int support_apart,
                                  const int *first_arm, const int *rows, const int *columns, const double *numbers, int apart, int done,
                                  float2 *object, byte *object_support, double *told, int width, int pixels) {
    int frame = blockIdx.x;
    const double *mine = numbers + (long long)frame * apart;
    int flags = (int)mine[FLAGS] | (int)mine[START_FLAGS], wrong = 0;
    for (int i = threadIdx.x; i <= done; i += THREADS) wrong += !(fabs(mine[ERRORS + i]) <= ENDLESS);
    wrong = (int)block_sum(wrong);
    if (flags == 0 && wrong > 0) flags = NONFINITE;
    int object_of = first_arm[frame] + (int)mine[KEPT];
    long long goal = (long long)frame * pixels, source = (long long)object_of * pixels, map = (long long)object_of * support_apart;
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        int centred = rows[i / width] * width + columns[i % width];
        float2 value = psi[goal + i];
        byte in = inside[goal + i];
        if (flags != 0) {
            value = (int)mine[START_FLAGS] & NO_SUPPORT ? make_float2(0.0f, 0.0f) : begun(start[source + centred]);
            in = support[map + centred] != 0;
        }
        object[goal + centred] = value;
        object_support[goal + centred] = in;
    }
    for (int i = threadIdx.x; i < apart; i += THREADS) told[(long long)frame * apart + i] = i == FLAGS ? (double)flags : mine[i];
}
