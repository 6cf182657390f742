// Objects -> objects some iterations later: each frame stays in the shared memory of one block of threads from the first iteration to the last.
//
// Comes behind refine.cu. In front of it stand, for one shape: HEIGHT, WIDTH, PITCH (of a row in shared memory), ROW_RADICES and
// COLUMN_RADICES (whose products are WIDTH and HEIGHT), FUSED_THREADS and BLOCKS (that share a multiprocessor). iterate_cuda.py chooses them.
//
// A transform of length N = R1 R2 ... is done in as many stages, each in place: a butterfly takes R numbers out of the field, transforms them in
// registers and puts them back where they were, so no second copy of the frame is needed, which would not fit. Forward, decimation in
// frequency: the large strides come first, and frequencies come out in mixed-radix digit-reversed order. Back, the same stages mirrored, which
// take that order. So nothing is ever reordered: the targets wait in the order in which frequencies come.
//
// The last stage of the columns, the modulus projection and the first stage of the way back have the same numbers in registers: one pass.
// So do the last stage of the way back along the rows, the update of the object and the first stage of the next iteration. With two
// stages an axis an iteration is six passes over shared memory and no pass over device memory but for the targets (and, where the rule
// remembers the object or the start, for those).
//
// Banks: shared memory serves half a warp's eight-byte numbers at once if they lie in different places modulo 16. Along the columns neighbouring
// threads take neighbouring columns. Along the rows they take neighbouring rows, and PITCH is odd; only where the object is read and
// written too do they take neighbouring pixels of a row, for device memory's sake.
//
// Rows that the support leaves empty are zero before the forward transform and not wanted after the way back: they are not transformed.

constexpr int ROW[] = {ROW_RADICES}, COLUMN[] = {COLUMN_RADICES};
constexpr int ROW_STAGES = sizeof(ROW) / sizeof(int), COLUMN_STAGES = sizeof(COLUMN) / sizeof(int);

#define HALF_ROOT 0.707106781186547524f

// cos(2 pi k / n) of a constant, by its series; 0 <= k < n.
__device__ constexpr double turn_cosine(int k, int n) {
    double angle = 6.283185307179586476925 * (2 * k > n ? n - k : k) / n, term = 1.0, sum = 1.0;
    for (int i = 1; i < 20; ++i) {
        term *= -angle * angle / ((2 * i - 1) * (2 * i));
        sum += term;
    }
    return sum;
}

template <int N> struct Turns {
    float cosine[N];
};

template <int N> __device__ constexpr Turns<N> turns_of() {
    Turns<N> turns = {};
    for (int k = 0; k < N; ++k) turns.cosine[k] = (float)turn_cosine(k, N);
    return turns;
}

// (first, second) times exp(-+2 pi i k / n), k and n known to the compiler, which leaves one of these lines.
template <bool BACK, int N> __device__ __forceinline__ float2 turned(float2 v, int k) {
    constexpr Turns<4 * N> turns = turns_of<4 * N>();  // sin(x) = cos(x - a quarter)
    if (k == 0) return v;
    if (BACK) k = N - k;
    if (4 * k == N) return make_float2(v.y, -v.x);
    if (2 * k == N) return make_float2(-v.x, -v.y);
    if (4 * k == 3 * N) return make_float2(-v.y, v.x);
    if (8 * k == N) return make_float2((v.x + v.y) * HALF_ROOT, (v.y - v.x) * HALF_ROOT);
    if (8 * k == 3 * N) return make_float2((v.y - v.x) * HALF_ROOT, -(v.x + v.y) * HALF_ROOT);
    if (8 * k == 5 * N) return make_float2(-(v.x + v.y) * HALF_ROOT, (v.x - v.y) * HALF_ROOT);
    if (8 * k == 7 * N) return make_float2((v.x - v.y) * HALF_ROOT, (v.x + v.y) * HALF_ROOT);
    float c = turns.cosine[4 * k], s = turns.cosine[(4 * k + 3 * N) % (4 * N)];
    return make_float2(v.x * c + v.y * s, v.y * c - v.x * s);
}

// Transform of an odd prime length: x[k] and x[R-k] share their products with the cosines and the sines.
template <bool BACK, int R> __device__ __forceinline__ void transform_odd(float2 (&v)[R]) {
    constexpr Turns<4 * R> turns = turns_of<4 * R>();
    float2 sum[R / 2], difference[R / 2], first = v[0];
#pragma unroll
    for (int k = 0; k < R / 2; ++k) {
        sum[k] = make_float2(v[k + 1].x + v[R - 1 - k].x, v[k + 1].y + v[R - 1 - k].y);
        difference[k] = make_float2(v[k + 1].x - v[R - 1 - k].x, v[k + 1].y - v[R - 1 - k].y);
        v[0].x += sum[k].x;
        v[0].y += sum[k].y;
    }
#pragma unroll
    for (int p = 1; p <= R / 2; ++p) {
        float2 even = first, odd = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int k = 0; k < R / 2; ++k) {
            int turn = (k + 1) * p % R;
            float c = turns.cosine[4 * turn], s = turns.cosine[(4 * turn + 3 * R) % (4 * R)];
            if (BACK) s = -s;
            even.x += c * sum[k].x;
            even.y += c * sum[k].y;
            odd.x += s * difference[k].x;
            odd.y += s * difference[k].y;
        }
        v[p] = make_float2(even.x + odd.y, even.y - odd.x);
        v[R - p] = make_float2(even.x - odd.y, even.y + odd.x);
    }
}

// Transform of R numbers in registers, unscaled, in natural order; BACK is the adjoint. Lengths that are no primes are taken apart (Cooley and
// Tukey 1965): A transforms along one index of the numbers written as a table, turns, B along the other.
template <bool BACK, int R> __device__ __forceinline__ void transform(float2 (&v)[R]) {
    if constexpr (R == 2) {
        float2 a = v[0], b = v[1];
        v[0] = make_float2(a.x + b.x, a.y + b.y);
        v[1] = make_float2(a.x - b.x, a.y - b.y);
    } else if constexpr (R == 4) {
        float2 a = make_float2(v[0].x + v[2].x, v[0].y + v[2].y), b = make_float2(v[0].x - v[2].x, v[0].y - v[2].y);
        float2 c = make_float2(v[1].x + v[3].x, v[1].y + v[3].y), d = make_float2(v[1].x - v[3].x, v[1].y - v[3].y);
        if (BACK) d = make_float2(-d.x, -d.y);
        v[0] = make_float2(a.x + c.x, a.y + c.y);
        v[1] = make_float2(b.x + d.y, b.y - d.x);
        v[2] = make_float2(a.x - c.x, a.y - c.y);
        v[3] = make_float2(b.x - d.y, b.y + d.x);
    } else if constexpr (R % 2 == 1 && R % 3 * (R % 5) != 0 || R == 3 || R == 5) {
        transform_odd<BACK, R>(v);
    } else if constexpr (R > 1) {
        constexpr int A = R % 4 == 0 ? 4 : R % 2 == 0 ? 2 : R % 3 == 0 ? 3 : 5, B = R / A;
        float2 whole[R];
#pragma unroll
        for (int b = 0; b < B; ++b) {
            float2 part[A];
#pragma unroll
            for (int a = 0; a < A; ++a) part[a] = v[B * a + b];
            transform<BACK, A>(part);
#pragma unroll
            for (int a = 0; a < A; ++a) whole[B * a + b] = turned<BACK, R>(part[a], a * b);
        }
#pragma unroll
        for (int a = 0; a < A; ++a) {
            float2 part[B];
#pragma unroll
            for (int b = 0; b < B; ++b) part[b] = whole[B * a + b];
            transform<BACK, B>(part);
#pragma unroll
            for (int b = 0; b < B; ++b) v[a + A * b] = part[b];
        }
    }
}

// One stage along the rows or the columns. STEP : between the numbers of a butterfly, in pixels along the axis.
template <bool ALONG_ROWS, int NUMBER> struct Stage {
    static constexpr int step() {
        int product = 1;
        for (int stage = NUMBER + 1; stage < (ALONG_ROWS ? ROW_STAGES : COLUMN_STAGES); ++stage) product *= ALONG_ROWS ? ROW[stage] : COLUMN[stage];
        return product;
    }
    static constexpr bool ROWS = ALONG_ROWS, FIRST = NUMBER == 0;
    static constexpr int RADIX = ALONG_ROWS ? ROW[NUMBER] : COLUMN[NUMBER], LENGTH = ALONG_ROWS ? WIDTH : HEIGHT, STEP = step();
    static constexpr int BUTTERFLIES = LENGTH / RADIX;           // in a line
    static constexpr int APART = ALONG_ROWS ? STEP : STEP * PITCH;  // of a butterfly's numbers in shared memory
};

// Shared memory of a frame. turns : exp(-2 pi i k / length) of the rows, then of the columns. lines : the rows with support come first.
struct Frame {
    float2 *field;
    const float2 *turns;
    const int *lines;
    const byte *used;
    int rows;  // with support
};

// A butterfly: its first number's place along the axis, its line, and how far its outputs are turned.
struct Spot {
    int first, line, turn;
};

template <class S> __device__ __forceinline__ Spot spot(int butterfly, int line) {
    int j = butterfly % S::STEP;
    return {(butterfly / S::STEP) * S::RADIX * S::STEP + j, line, j * (S::LENGTH / (S::RADIX * S::STEP))};
}

template <class S> __device__ __forceinline__ int address(Spot at) { return S::ROWS ? at.line * PITCH + at.first : at.first * PITCH + at.line; }

// The n-th butterfly of a pass, neighbours for neighbouring threads as told above. rows : how many rows are transformed.
template <class S> __device__ __forceinline__ Spot nth(int n, int rows, const int *lines) {
    if (!S::ROWS) return spot<S>(n / WIDTH, n % WIDTH);
    int line = S::FIRST ? n / S::BUTTERFLIES : n % rows;
    return spot<S>(S::FIRST ? n % S::BUTTERFLIES : n / rows, rows == HEIGHT ? line : lines[line]);
}

// Turn a butterfly's numbers to or from where the stage below has them; the last stage has nothing to turn.
template <bool BACK, class S> __device__ __forceinline__ void turn(float2 (&v)[S::RADIX], Spot at, const float2 *turns) {
    if constexpr (S::STEP > 1) {
#pragma unroll
        for (int p = 1; p < S::RADIX; ++p) {
            float2 w = turns[(S::ROWS ? 0 : WIDTH) + p * at.turn];
            if (BACK) w.y = -w.y;
            v[p] = make_float2(v[p].x * w.x - v[p].y * w.y, v[p].x * w.y + v[p].y * w.x);
        }
    }
}

// Between registers and shared memory. every : whether rows without support take part. They do not where the columns' first stage takes the
// object, and meets them as zeros, nor where it is put back.
template <class S> __device__ __forceinline__ void take(float2 (&v)[S::RADIX], Spot at, const Frame &frame, bool every) {
    const float2 *place = frame.field + address<S>(at);
#pragma unroll
    for (int p = 0; p < S::RADIX; ++p) {
        bool there = S::ROWS || !S::FIRST || every || frame.used[at.first + p * S::STEP];
        v[p] = there ? place[p * S::APART] : make_float2(0.0f, 0.0f);
    }
}

template <class S> __device__ __forceinline__ void put(const float2 (&v)[S::RADIX], Spot at, const Frame &frame, bool every) {
    float2 *place = frame.field + address<S>(at);
#pragma unroll
    for (int p = 0; p < S::RADIX; ++p) {
        if (S::ROWS || !S::FIRST || every || frame.used[at.first + p * S::STEP]) place[p * S::APART] = v[p];
    }
}

template <bool BACK, class S> __device__ __forceinline__ void pass(const Frame &frame, int rows, bool every) {
    int number = (S::ROWS ? rows : WIDTH) * S::BUTTERFLIES;
    for (int n = threadIdx.x; n < number; n += FUSED_THREADS) {
        Spot at = nth<S>(n, rows, frame.lines);
        float2 v[S::RADIX];
        take<S>(v, at, frame, every || BACK);
        if (BACK) turn<BACK, S>(v, at, frame.turns);
        transform<BACK, S::RADIX>(v);
        if (!BACK) turn<BACK, S>(v, at, frame.turns);
        put<S>(v, at, frame, every || !BACK);
    }
    __syncthreads();
}

// Stages FROM .. END-1 of an axis in order, or from END-1 down to FROM on the way back.
template <bool BACK, bool ROWS, int FROM, int END> __device__ __forceinline__ void passes(const Frame &frame, int rows, bool every) {
    if constexpr (FROM < END) {
        pass<BACK, Stage<ROWS, BACK ? END - 1 : FROM>>(frame, rows, every);
        passes<BACK, ROWS, BACK ? FROM : FROM + 1, BACK ? END - 1 : END>(frame, rows, every);
    }
}

// The last stage of the columns, P_M, and back; returns this thread's part of the misfit. target : of this frame.
__device__ __forceinline__ float project_columns(const Frame &frame, const float *target, float inverse, bool every) {
    using S = Stage<false, COLUMN_STAGES - 1>;
    float misfit = 0.0f;
    for (int n = threadIdx.x; n < WIDTH * S::BUTTERFLIES; n += FUSED_THREADS) {
        Spot at = nth<S>(n, frame.rows, frame.lines);
        float2 v[S::RADIX];
        take<S>(v, at, frame, every);
        transform<false, S::RADIX>(v);
#pragma unroll
        for (int p = 0; p < S::RADIX; ++p) misfit += constrain(v[p], target[(at.first + p) * WIDTH + at.line], inverse);
        transform<true, S::RADIX>(v);
        put<S>(v, at, frame, false);
    }
    __syncthreads();
    return misfit;
}

// The object as it is -> the first stage of the rows.
__device__ __forceinline__ void enter_rows(const Frame &frame, const float2 *psi) {
    using S = Stage<true, 0>;
    for (int n = threadIdx.x; n < HEIGHT * S::BUTTERFLIES; n += FUSED_THREADS) {
        Spot at = nth<S>(n, HEIGHT, frame.lines);
        float2 v[S::RADIX];
#pragma unroll
        for (int p = 0; p < S::RADIX; ++p) v[p] = psi[at.line * WIDTH + at.first + p * S::STEP];
        transform<false, S::RADIX>(v);
        turn<false, S>(v, at, frame.turns);
        put<S>(v, at, frame, true);
    }
    __syncthreads();
}

// The last stage back along the rows, the update of the object, and the first stage of the next iteration, unless this was the last.
__device__ __forceinline__ void update_rows(const Frame &frame, const byte *inside, const float2 *anchor, float2 *psi, float old, float fresh,
                                            float weight, bool keep, bool last) {
    using S = Stage<true, 0>;
    for (int n = threadIdx.x; n < frame.rows * S::BUTTERFLIES; n += FUSED_THREADS) {
        Spot at = nth<S>(n, frame.rows, frame.lines);
        float2 v[S::RADIX];
        take<S>(v, at, frame, true);
        turn<true, S>(v, at, frame.turns);
        transform<true, S::RADIX>(v);
#pragma unroll
        for (int p = 0; p < S::RADIX; ++p) {
            int pixel = at.line * WIDTH + at.first + p * S::STEP;
            v[p] = updated(v[p], inside[pixel] != 0, psi + pixel, anchor + pixel, old, fresh, weight);
            if (keep) psi[pixel] = v[p];
        }
        if (last) continue;
        transform<false, S::RADIX>(v);
        turn<false, S>(v, at, frame.turns);
        put<S>(v, at, frame, true);
    }
    __syncthreads();
}

// Which rows hold support, and their list. Where the rule leaves something outside the support all do.
__device__ __forceinline__ int find_rows(const byte *inside, bool all, byte *used, int *lines) {
    for (int y = threadIdx.x; y < HEIGHT; y += FUSED_THREADS) {
        bool any = all;
        for (int x = 0; x < WIDTH && !any; ++x) any = inside[y * WIDTH + x] != 0;
        used[y] = any;
    }
    __syncthreads();
    int rows = 0;
    for (int y = 0; y < HEIGHT; ++y) {
        if (used[y] && threadIdx.x == 0) lines[rows] = y;
        rows += used[y];
    }
    __syncthreads();
    return rows;
}

__device__ __forceinline__ Frame lay_out(float2 *shared, const float2 *turns, const int *lines, const byte *used, int rows) {
    float2 *own = shared + HEIGHT * PITCH;
    for (int i = threadIdx.x; i < WIDTH + HEIGHT; i += FUSED_THREADS) own[i] = turns[i];
    __syncthreads();
    return {shared, own, lines, used, rows};
}

// `times` iterations of one rule (old, fresh, weight) on each object. turns : (WIDTH + HEIGHT,); target : of each frame, in the order of the
// frequencies here; the misfits before each iteration go into the rows of numbers, from ERRORS + done on.
extern "C" __global__ void __launch_bounds__(FUSED_THREADS, BLOCKS) iterate_objects(
    const float2 *turns, const float *target, const int *frame_of, const byte *inside, const float2 *anchor, float2 *psi, double *numbers,
    int apart, int done, int times, float old, float fresh, float weight, float inverse) {
    extern __shared__ float2 shared[];
    __shared__ byte used[HEIGHT];
    __shared__ int lines[HEIGHT];
    __shared__ double parts[FUSED_THREADS], sums[32];
    long long first = (long long)blockIdx.x * HEIGHT * WIDTH;
    bool remembers = old != 0.0f || fresh != 0.0f || weight > 0.0f;
    int rows = find_rows(inside + first, remembers, used, lines);
    Frame frame = lay_out(shared, turns, lines, used, rows);
    const float *wanted = target + (long long)frame_of[blockIdx.x] * HEIGHT * WIDTH;
    enter_rows(frame, psi + first);
    for (int i = 0; i < times; ++i) {
        bool last = i == times - 1, every = i == 0;  // the object that came may be anywhere
        passes<false, true, 1, ROW_STAGES>(frame, every ? HEIGHT : rows, true);
        passes<false, false, 0, COLUMN_STAGES - 1>(frame, rows, every);
        parts[threadIdx.x] = project_columns(frame, wanted, inverse, every);
        __syncthreads();
        if (threadIdx.x < 32) {  // a fixed order of adding, in two steps that other warps need not wait for
            double sum = 0.0;
            for (int k = threadIdx.x; k < FUSED_THREADS; k += 32) sum += parts[k];
            sums[threadIdx.x] = sum;
        }
        passes<true, false, 0, COLUMN_STAGES - 1>(frame, rows, false);
        passes<true, true, 1, ROW_STAGES>(frame, rows, true);
        update_rows(frame, inside + first, anchor + first, psi + first, old, fresh, weight, remembers || last, last);
        if (threadIdx.x == 0) {
            double sum = 0.0;
            for (int k = 0; k < 32; ++k) sum += sums[k];
            numbers[(long long)blockIdx.x * apart + ERRORS + done + i] = sum;
        }
    }
    // Rows without support were not computed.
    for (int n = threadIdx.x; n < HEIGHT * WIDTH; n += FUSED_THREADS) {
        if (!used[n / WIDTH]) psi[first + n] = make_float2(0.0f, 0.0f);
    }
}

// Each object's transform, in the order of the frequencies here; psi stays.
extern "C" __global__ void __launch_bounds__(FUSED_THREADS, BLOCKS) transform_objects(const float2 *turns, const float2 *psi, float2 *field) {
    extern __shared__ float2 shared[];
    long long first = (long long)blockIdx.x * HEIGHT * WIDTH;
    Frame frame = lay_out(shared, turns, nullptr, nullptr, HEIGHT);
    enter_rows(frame, psi + first);
    passes<false, true, 1, ROW_STAGES>(frame, HEIGHT, true);
    passes<false, false, 0, COLUMN_STAGES>(frame, HEIGHT, true);
    for (int n = threadIdx.x; n < HEIGHT * WIDTH; n += FUSED_THREADS) field[first + n] = shared[n / WIDTH * PITCH + n % WIDTH];
}
