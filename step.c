/* A step of generation on a CPU, and products with weights that do not change. common.py, section 5.1, compiles
   this where there is a C compiler; without one torch's operations do the same. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t T;
#define PAIR 2                                                  /* inputs that share 32 bits */
static inline float get(T x) {
    uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4);
    return f;
}
static inline T put(float f) {                                  /* to the nearest, ties to even */
    uint32_t u; memcpy(&u, &f, 4);
    return f == f ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fc0;
}
#else
typedef float T;
#define PAIR 1
static inline float get(T x) { return x; }
static inline T put(float f) { return f; }
#endif

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define WIDE 4                                                  /* panels of a tile: as registers allow */
#else
#define WIDE 1
#endif
#define ROWS 4

/* Sums are written as 16 lanes: what a row gets must not depend on where it stands in memory. */
typedef float V __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
INLINE V load(const float *x) { V v; memcpy(&v, x, 64); return v; }

INLINE V widened(const T *x, int64_t n) {                       /* 16 numbers; n < 16: the rest is zero */
    T all[16] = {0};
    memcpy(all, x, n < 16 ? n * sizeof(T) : sizeof(all));
#ifdef BFLOAT16
    typedef uint16_t S __attribute__((vector_size(32)));
    S s; memcpy(&s, all, 32);
#ifdef __AVX512F__
    return (V)((U)_mm512_cvtepu16_epi32((__m256i)s) << 16);
#else
    return (V)(__builtin_convertvector(s, U) << 16);
#endif
#else
    return load(all);
#endif
}
INLINE void store(T *y, V v, int64_t n) {                       /* n of them, rounded as `put` does */
#ifdef BFLOAT16
    typedef uint16_t S __attribute__((vector_size(32)));
    U u = (U)v, nan = (U)(v != v);
    S s = __builtin_convertvector((~nan & (u + 0x7fff + (u >> 16 & 1)) >> 16) | (nan & 0x7fc0), S);
#else
    V s = v;
#endif
    if (n >= 16) memcpy(y, &s, 16 * sizeof(T)); else memcpy(y, &s, n * sizeof(T));
}

/* A multiplication takes 16 outputs at a time, and 32 bits of inputs: PAIR of T, or, where the weights are of
   8 bits (`small`), two of 16 bits; sums of these are integers and exact. */
INLINE U weights(const char *w, int64_t at, int small) {
    typedef int8_t S __attribute__((vector_size(32)));
    typedef int16_t L __attribute__((vector_size(64)));
    U u; S s;
    if (!small) { memcpy(&u, w + 64 * at, 64); return u; }
    memcpy(&s, w + 32 * at, 32);
#ifdef __AVX512VNNI__
    return (U)_mm512_cvtepi8_epi16((__m256i)s);
#else
    return (U)__builtin_convertvector(s, L);
#endif
}
INLINE V multiplied(V sum, U w, uint32_t x, int small) {        /* sum + w x */
    U xs = x - (U){};
    if (small) {
#ifdef __AVX512VNNI__
        return (V)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)xs);
#else
        return (V)((I)sum + ((I)(w << 16) >> 16) * ((I)(xs << 16) >> 16) + ((I)w >> 16) * ((I)xs >> 16));
#endif
    }
#ifndef BFLOAT16
    return sum + (V)w * (V)xs;
#elif defined(__AVX512BF16__)
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)xs);
#else
    sum += (V)(w << 16) * (V)(xs << 16);
    return sum + (V)(w & 0xffff0000) * (V)(xs & 0xffff0000);
#endif
}

/* y[r, 16 p + lane] for `rows` rows and `wide` panels of n times 32 bits of inputs; `count` outputs are
   there. With ROWS rows the weights at `next` are fetched meanwhile. */
INLINE void tile(const char *w, const char *next, const T *scale, const char *x, const float *unit, T *y,
                 int64_t n, int64_t N, int64_t count, int rows, int wide, int small) {
    V sums[ROWS][WIDE] = {{{0}}};
    for (int64_t k = 0; k < n; k++) {
        U each[WIDE];
        if (rows == ROWS) __builtin_prefetch(next + k * (small ? 32 : 64), 0, 2);
        for (int p = 0; p < wide; p++) each[p] = weights(w, p * n + k, small);
        for (int r = 0; r < rows; r++) {
            uint32_t bits; memcpy(&bits, x + 4 * (r * n + k), 4);
            for (int p = 0; p < wide; p++) sums[r][p] = multiplied(sums[r][p], each[p], bits, small);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < wide; p++) {
            int64_t i = 16 * p, there = count - i < 16 ? count - i : 16;
            V v = sums[r][p];
            if (small) v = __builtin_convertvector((I)v, V) * unit[r] * widened(scale + i, there);
            store(y + r * N + i, v, there);
        }
}

#define TILES(wide, small) switch (rows) { \
    case 1: tile(w, next, scale, x, unit, y, n, N, count, 1, wide, small); break; \
    case 2: tile(w, next, scale, x, unit, y, n, N, count, 2, wide, small); break; \
    case 3: tile(w, next, scale, x, unit, y, n, N, count, 3, wide, small); break; \
    default: tile(w, next, scale, x, unit, y, n, N, count, 4, wide, small); }

static void tiles(const char *w, const T *scale, const char *x, const float *unit, T *y, int64_t B, int64_t n,
                  int64_t N, int64_t count, int whole) {
    for (int64_t b = 0; b < B; b += ROWS, x += 4 * ROWS * n, y += ROWS * N, unit += scale ? ROWS : 0) {
        int64_t rows = B - b < ROWS ? B - b : ROWS, panel = n * (scale ? 32 : 64);
        const char *next = whole && B > ROWS && b < WIDE * ROWS ? w + (WIDE + b / ROWS) * panel : w;
        if (whole) { if (scale) TILES(WIDE, 1) else TILES(WIDE, 0) }
        else { if (scale) TILES(1, 1) else TILES(1, 0) }
    }
}

static void *scratch(int64_t size) {                            /* a thread's own, kept for its next call */
    static _Thread_local char *at = 0;
    static _Thread_local int64_t room = 0;
    if (size > room) { free(at); at = malloc(room = size); }
    return at;
}

/* y (B, N) = x (B, K) wᵀ. w: for every 16 outputs a panel, (K / PAIR, 16, PAIR), of T; or with a scale (N)
   for each output (K / 2, 16, 2) of 8 bits: then each row of x is rounded to 2 most + 1 steps. All threads of
   a parallel region call it together. */
static void multiply(const char *w, const T *scale, const T *x, T *y, int64_t B, int64_t K, int64_t N) {
    int64_t panels = (N + 15) / 16, groups = (panels + WIDE - 1) / WIDE, n = scale ? K / 2 : K / PAIR;
    const char *from = (const char *)x;
    float *unit = 0;
    if (scale) {
        int64_t most = 0x7fffffff / 128 / K < 16383 ? 0x7fffffff / 128 / K : 16383;     /* sums fit 32 bits */
        unit = scratch(B * (2 * K + 4));
        int16_t *q = (int16_t *)(unit + B);
        from = (const char *)q;
        for (int64_t b = 0; b < B; b++, x += K, q += K) {
            float sizes[16] = {0}, peak = 1e-30f;
            for (int64_t i = 0; i < K; i += 16) {
                V v = widened(x + i, K - i);
                for (int j = 0; j < 16; j++) sizes[j] = fabsf(v[j]) > sizes[j] ? fabsf(v[j]) : sizes[j];
            }
            for (int j = 0; j < 16; j++) peak = sizes[j] > peak ? sizes[j] : peak;
            float steps = most / peak;
            unit[b] = peak / most;
            for (int64_t i = 0; i < K; i++) q[i] = (int16_t)rintf(get(x[i]) * steps);
        }
    }
    #pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
        int whole = (g + 1) * WIDE <= panels;
        for (int64_t p = g * WIDE; p < panels && p < (g + 1) * WIDE; p += whole ? WIDE : 1)
            tiles(w + p * n * (scale ? 32 : 64), scale ? scale + 16 * p : scale, from, unit, y + 16 * p, B, n,
                  N, N - 16 * p, whole);
    }
}

void product(const char *w, const T *scale, const T *x, T *y, int64_t B, int64_t K, int64_t N, int threads) {
    #pragma omp parallel num_threads(threads) if (threads > 1)
    multiply(w, scale, x, y, B, K, N);
}

#ifdef E
INLINE float total(V v) {
    typedef float V8 __attribute__((vector_size(32)));
    typedef float V4 __attribute__((vector_size(16)));
    V8 a[2]; memcpy(a, &v, 64); a[0] += a[1];
    V4 c[2]; memcpy(c, a, 32); c[0] += c[1];
    return c[0][0] + c[0][2] + (c[0][1] + c[0][3]);
}
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif
INLINE V totals(V *x) {                                                         /* the total of each of 16 */
    for (int i = 0; i < 8; i++)
        x[i] = PICK(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
             + PICK(x[2 * i], x[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        x[i] = PICK(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
             + PICK(x[2 * i], x[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        x[i] = PICK(x[2 * i], x[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29)
             + PICK(x[2 * i], x[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return PICK(x[0], x[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
         + PICK(x[0], x[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
INLINE float exponential(float x) {                             /* expf of Cephes, without branches */
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f, y, power;
    y = 1.6666665459e-1f + r * (4.1665795894e-2f + r * (8.3334519073e-3f + r * (1.3981999507e-3f
        + r * 1.9875691500e-4f)));
    int32_t bits = ((int32_t)n + 127) << 23; memcpy(&power, &bits, 4);
    return (1 + r * (1 + r * (0.5f + r * y))) * power;
}

/* x += more, if any; y = RMSNorm(x); all (B, D) */
static void add_norm(T *xs, const T *mores, const T *weight, T *ys, int64_t B, int64_t D, float eps) {
    #pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++) {
        T *x = xs + b * D, *y = ys + b * D;
        V squares = {0};
        if (mores) {
            const T *more = mores + b * D;
            for (int64_t i = 0; i < D; i++) x[i] = put(get(x[i]) + get(more[i]));
        }
        for (int64_t i = 0; i < D; i += 16) { V v = widened(x + i, D - i); squares += v * v; }
        float scale = 1 / sqrtf(total(squares) / D + eps);
        for (int64_t i = 0; i < D; i++) y[i] = put(get(x[i]) * scale * get(weight[i]));
    }
}

/* y (B, D) = silu(gate) * up of x (B, gate and up) */
static void gate_up(const T *xs, T *ys, int64_t B, int64_t D) {
    #pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++) {
        const T *x = xs + b * 2 * D; T *y = ys + b * D;
        for (int64_t i = 0; i < D; i++) {
            float gate = get(x[i]);
            y[i] = put(gate / (1 + exponential(-gate)) * get(x[D + i]));
        }
    }
}

/* x (B, q k v, E): norms (if any) and rotary angles; queries go to `turned`, keys and values into column
   at[b] of the cache, with `row` and `head` from one row or head to the next; y (B, G R, E): attention of R
   queries a head to the columns up to it, to the last `window` of them if that is not 0. With row = 0 they
   are B tokens of one. */
#define ROOM ((E + 15) / 16 * 16)
static void attend(const T *xs, const T *weight, const float *rope, int64_t context, T *keys, T *values,
                   int64_t row, int64_t head, const int64_t *at, float *turned, T *y, int64_t B, int64_t G,
                   int64_t window, float eps) {
    #pragma omp for schedule(static)
    for (int64_t i = 0; i < B * G; i++) {
        int64_t b = i / G, g = i % G, place = at[b] < context ? at[b] : context - 1;
        const T *x = xs + b * (G * R + 2 * G) * E;
        const float *cosine = rope + place * (E / 2), *sine = cosine + context * (E / 2);
        T *k = keys + b * row + g * head + at[b] * E, *v = values + b * row + g * head + at[b] * E;
        for (int r = 0; r <= R; r++) {                          /* R queries and the key */
            int64_t h = r < R ? g * R + r : G * R + g;
            float wide[ROOM] = {0}, out[ROOM] = {0};
            for (int i = 0; i < E; i++) wide[i] = get(x[h * E + i]);
            if (weight) {
                V squares = {0};
                for (int i = 0; i < ROOM; i += 16) squares += load(wide + i) * load(wide + i);
                float scale = 1 / sqrtf(total(squares) / E + eps);
                for (int i = 0; i < E; i++) wide[i] *= scale * get(weight[h * E + i]);
            }
            for (int i = 0; i < E / 2; i++) {
                out[i] = wide[i] * cosine[i] - wide[i + E / 2] * sine[i];
                out[i + E / 2] = wide[i + E / 2] * cosine[i] + wide[i] * sine[i];
            }
            float *to = turned + ((b * G + g) * R + r) * ROOM;
            if (r < R) for (int i = 0; i < ROOM; i++) to[i] = out[i] / sqrtf(E);
            else for (int i = 0; i < E; i++) k[i] = put(out[i]);
        }
        memcpy(v, x + (G * R + G + g) * E, E * sizeof(T));
    }
    #pragma omp for schedule(static)
    for (int64_t i = 0; i < B * G; i++) {
        int64_t b = i / G, g = i % G, n = at[b] + 1, from = window && n > window ? n - window : 0;
        int64_t seen = n - from, room = seen + 17;
        const T *k = keys + b * row + g * head + from * E, *v = values + b * row + g * head + from * E;
        float *scores = malloc(R * room * sizeof(float)), *q = turned + i * R * ROOM;
        V out[R][ROOM / 16] = {{{0}}};
        for (int64_t begin = 0; begin < seen; begin += 16) {    /* scores of 16 keys at a time */
            V key[16][ROOM / 16], sums[16];
            for (int j = 0; j < 16; j++) {
                const T *from = k + (begin + j < seen ? begin + j : seen - 1) * E;
                for (int c = 0; c < ROOM / 16; c++) key[j][c] = widened(from + 16 * c, E - 16 * c);
            }
            for (int r = 0; r < R; r++) {
                for (int j = 0; j < 16; j++) {
                    sums[j] = load(q + r * ROOM) * key[j][0];
                    for (int c = 1; c < ROOM / 16; c++) sums[j] += load(q + r * ROOM + 16 * c) * key[j][c];
                }
                V all = totals(sums);
                memcpy(scores + r * room + begin, &all, 64);
            }
        }
        for (int r = 0; r < R; r++) {
            float *s = scores + r * room, most[16];
            V sum = {0};
            for (int i = 0; i < 16; i++) s[seen + i] = most[i] = -3e38f;
            for (int64_t j = 0; j < seen; j += 16)
                for (int i = 0; i < 16; i++) most[i] = s[j + i] > most[i] ? s[j + i] : most[i];
            for (int i = 1; i < 16; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
            for (int64_t j = 0; j < seen; j++) s[j] = exponential(s[j] - most[0]);
            for (int i = 0; i < 16; i++) s[seen + i] = 0;
            for (int64_t j = 0; j < seen; j += 16) sum += load(s + j);
            float share = 1 / total(sum);
            for (int64_t j = 0; j < seen; j++) s[j] *= share;
        }
        for (int64_t j = 0; j < seen; j++) {
            V value[ROOM / 16];
            for (int c = 0; c < ROOM / 16; c++) value[c] = widened(v + j * E + 16 * c, E - 16 * c);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < ROOM / 16; c++) out[r][c] += scores[r * room + j] * value[c];
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < E; i++) y[((b * G + g) * R + r) * E + i] = put(out[r][i / 16][i % 16]);
        free(scores);
    }
}

/* One layer's weights (with their scales, or 0) and cache */
typedef struct {
    const T *norm; const char *qkv; const T *qkv_scale, *norm_qk; const char *out; const T *out_scale;
    const T *norm_mlp; const char *gate_up; const T *gate_up_scale; const char *down; const T *down_scale;
    T *keys, *values;
} Layer;

/* y (B, D): the normalised hidden states of tokens ids (B), read into columns `at` of the cache */
void step(const Layer *layers, int64_t count, const T *embedding, const T *norm, const int64_t *ids, T *y,
          int64_t B, int64_t D, int64_t H, const float *rope, int64_t context, int64_t row, int64_t head,
          const int64_t *at, int64_t G, int64_t window, float eps, float eps_qk, int threads) {
    int64_t heads = G * R * E, joined = heads + 2 * G * E > 2 * H ? heads + 2 * G * E : 2 * H;
    T *x = malloc(B * (2 * D + joined + heads + H) * sizeof(T)), *more = x + B * D, *both = more + B * D;
    T *mixed = both + B * joined, *hidden = mixed + B * heads;
    float *turned = malloc(B * G * R * ROOM * sizeof(float));
    for (int64_t b = 0; b < B; b++) memcpy(x + b * D, embedding + ids[b] * D, D * sizeof(T));
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t i = 0; i < count; i++) {
            const Layer *l = layers + i;
            add_norm(x, i ? more : 0, l->norm, y, B, D, eps);
            multiply(l->qkv, l->qkv_scale, y, both, B, D, heads + 2 * G * E);
            attend(both, l->norm_qk, rope, context, l->keys, l->values, row, head, at, turned, mixed, B, G,
                   window, eps_qk);
            multiply(l->out, l->out_scale, mixed, more, B, heads, D);
            add_norm(x, more, l->norm_mlp, y, B, D, eps);
            multiply(l->gate_up, l->gate_up_scale, y, both, B, D, 2 * H);
            gate_up(both, hidden, B, H);
            multiply(l->down, l->down_scale, hidden, more, B, H, D);
        }
        add_norm(x, more, norm, y, B, D, eps);
    }
    free(x);
    free(turned);
}
#endif
