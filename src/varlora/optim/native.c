/* IVON's draw and step on a CPU, in one pass over memory each, with the noise made where it is used.

   The noise ε of a parameter's element i is that of noise.py: Philox4x32-10 (Salmon et al. 2011, Parallel random numbers:
   as easy as 1, 2, 3) at the counter (16 ⌊i/64⌋ + i mod 16, position), two words to a pair of normal numbers (Box and
   Muller 1958). Elements are worked off in tiles of 64: words 0 to 3 of 16 counters.

   Nothing here may depend on the processor or on how the work is shared out, so it is compiled without fused
   multiply-add and without reordering, and has its own logarithm, sine and cosine. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

enum { VERSION = 3, LANES = 16, TILE = 4 * LANES };

/* Some of a parameter's elements, in order. */
typedef struct {
    int64_t at;       /* where they start in the flat state */
    int64_t count;
    int64_t position; /* the parameter's */
    int64_t first;    /* index of the first one within the parameter */
    float *theta;     /* the parameter's memory, from the first one on */
    const float *grad;
} Segment;

/* What a step needs beside the state; `bias` is 1 − β₁ᵗ, or 1 without debiasing. */
typedef struct {
    float ess, delta, beta1_less, beta2_less, half_square, lr_over_bias, clip_times_bias, delta_times_bias;
    float batch_size; /* of the estimator B ĝ²; 0 for Price's */
} Settings;

typedef struct {
    uint64_t key;
    const Segment *segments;
    int64_t count;
    float *mean, *momentum, *hess;
    Settings settings;
    int32_t widest; /* the widest vectors to use: 512 or 256 bits, or 0 for what every processor has */
} Work;

/* --- noise */

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* ln x for x in (0, 1]: Cephes' logf. */
INLINE float ln(float x) {
    uint32_t bits = as_bits(x) - 0x3f3504f3u; /* x / √½: its exponent, and its mantissa in [√½, √2) */
    float e = (float)((int32_t)bits >> 23);
    float f = as_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    float z = f * f;
    float y = 7.0376836292e-2f;
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    y = y * f * z + e * -2.12194440e-4f - 0.5f * z;
    return f + y + e * 0.693359375f;
}

INLINE void box_muller(uint32_t a, uint32_t b, float *first, float *second) {
    float u = (float)(int32_t)(a >> 1) * 0x1p-31f + 0x1p-32f; /* (0, 1] */
    float r = sqrtf(-2.0f * ln(u));
    float t = (float)(int32_t)(b << 2) * 0x1.921fb6p-32f; /* 30 bits are an angle in [−π/4, π/4) */
    float s = t * t;
    float sine = ((-1.9515295891e-4f * s + 8.3321608736e-3f) * s - 1.6666654611e-1f) * s * t + t;
    float cosine = (2.443315711809948e-5f * s - 1.388731625493765e-3f) * s + 4.166664568298827e-2f;
    cosine = cosine * s * s - 0.5f * s + 1.0f;
    uint32_t x = as_bits(cosine), y = as_bits(sine); /* two bits turn it to one of four quadrants */
    uint32_t swap = (x ^ y) & (0u - (b >> 30 & 1u));
    *first = r * as_float(x ^ swap ^ (b & 0x80000000u));
    *second = r * as_float(y ^ swap ^ ((b ^ b << 1) & 0x80000000u));
}

/* --- what is done to n elements of a segment from the i-th on, which have the noise `eps` */

typedef void (*Some)(const Work *work, const Segment *of, int64_t i, int n, const float *eps);

INLINE void normal_some(const Work *work, const Segment *of, int64_t i, int n, const float *eps) {
    (void)work;
    memcpy(of->theta + i, eps, sizeof(float) * (size_t)n);
}

INLINE void draw_some(const Work *work, const Segment *of, int64_t i, int n, const float *eps) {
    const float *m = work->mean + of->at + i, *h = work->hess + of->at + i;
    float *theta = of->theta + i, ess = work->settings.ess, delta = work->settings.delta;
    for (int j = 0; j < n; j++) theta[j] = m[j] + eps[j] / sqrtf(ess * (h[j] + delta)); /* θ = m + σε */
}

INLINE void update_some(const Work *work, const Segment *of, int64_t i, int n, const float *eps, int price) {
    float *m = work->mean + of->at + i, *g = work->momentum + of->at + i, *h = work->hess + of->at + i;
    float *theta = of->theta + i;
    const float *ghat = of->grad + i;
    const Settings w = work->settings;
    for (int j = 0; j < n; j++) {
        /* ĥ = ĝ(θ − m)/σ² = ĝε/σ, or B ĝ² */
        float hhat = price ? ghat[j] * eps[j] * sqrtf(w.ess * (h[j] + w.delta)) : ghat[j] * ghat[j] * w.batch_size;
        /* g ← β₁g + (1 − β₁)ĝ */
        float g_new = g[j] + w.beta1_less * (ghat[j] - g[j]);
        /* h ← β₂h + (1 − β₂)ĥ + ½(1 − β₂)²(h − ĥ)²/(h + δ) */
        float change = hhat - h[j];
        float h_new = h[j] + w.beta2_less * change + w.half_square * (change * change / (h[j] + w.delta));
        /* m ← m − α clip((g/(1 − β₁ᵗ) + δm)/(h + δ), ±ξ), with 1 − β₁ᵗ taken out of the bracket */
        float step = (g_new + w.delta_times_bias * m[j]) / (h_new + w.delta), bound = w.clip_times_bias;
        step = step > bound ? bound : step < -bound ? -bound : step;
        g[j] = g_new;
        h[j] = h_new;
        theta[j] = m[j] = m[j] - w.lr_over_bias * step;
    }
}

INLINE void price_some(const Work *work, const Segment *of, int64_t i, int n, const float *eps) {
    update_some(work, of, i, n, eps, 1);
}

INLINE void gradsq_some(const Work *work, const Segment *of, int64_t i, int n, const float *eps) {
    update_some(work, of, i, n, eps, 0);
}

/* --- the loops, for each kind of processor */

#define FOR
#define NAME(f) f##_plain
#define VECTOR uint64_t
#define TIMES(x, c) ((uint64_t)(uint32_t)(x) * (c))
#include "native_tiles.h"

#if defined(__GNUC__) && defined(__x86_64__)
typedef uint64_t u64x4 __attribute__((vector_size(32)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));

#define FOR __attribute__((target("avx2")))
#define NAME(f) f##_avx2
#define VECTOR u64x4
#define TIMES(x, c) ((u64x4)_mm256_mul_epu32((__m256i)(x), _mm256_set1_epi64x(c)))
#include "native_tiles.h"

#define FOR __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define NAME(f) f##_avx512
#define VECTOR u64x8
#define TIMES(x, c) ((u64x8)_mm512_mul_epu32((__m512i)(x), _mm512_set1_epi64(c)))
#include "native_tiles.h"

#define HAS __builtin_cpu_supports
#define HAS_AVX512 (HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl"))
#define RUN(f, work)                                         \
    ((work)->widest >= 512 && HAS_AVX512     ? f##_avx512(work) \
     : (work)->widest >= 256 && HAS("avx2") ? f##_avx2(work)   \
                                            : f##_plain(work))
#else
#define RUN(f, work) f##_plain(work)
#endif

/* --- what native.py calls */

EXPORT int ivon_version(void) { return VERSION; }

/* Write ε to where `theta` points. */
EXPORT int ivon_normal(const Work *work) {
    RUN(normal, work);
    return 1;
}

/* Write θ = m + σε to where `theta` points. */
EXPORT int ivon_draw(const Work *work) {
    RUN(draw, work);
    return 1;
}

/* Make a step on mean, momentum and Hessian, and write the mean to where `theta` points. */
EXPORT int ivon_update(const Work *work) {
    if (work->settings.batch_size > 0)
        RUN(gradsq, work);
    else
        RUN(price, work);
    return 1;
}

/* Return whether all gradients are finite. */
EXPORT int ivon_finite(const Work *work) {
    for (const Segment *of = work->segments; of < work->segments + work->count; of++) {
        uint32_t found = 0; /* an exponent of ones carries over into the sign */
        for (int64_t i = 0; i < of->count; i++) found |= (as_bits(of->grad[i]) & 0x7f800000u) + 0x00800000u;
        if (found & 0x80000000u) return 0;
    }
    return 1;
}

/* Scale gradients to a norm of at most `bound`; return the norm that they had. */
EXPORT double ivon_clip(float *const *gradients, const int64_t *counts, int64_t number, double bound) {
    double squares[LANES] = {0}, square = 0;
    for (int64_t k = 0; k < number; k++) {
        const float *grad = gradients[k];
        int64_t i = 0;
        for (; i + LANES <= counts[k]; i += LANES)
            for (int j = 0; j < LANES; j++) squares[j] += (double)grad[i + j] * grad[i + j];
        for (int j = 0; i + j < counts[k]; j++) squares[j] += (double)grad[i + j] * grad[i + j];
    }
    for (int j = 0; j < LANES; j++) square += squares[j];
    double norm = sqrt(square), share = bound / (norm + 1e-6);
    for (int64_t k = 0; k < number && share < 1; k++)
        for (int64_t i = 0; i < counts[k]; i++) gradients[k][i] *= (float)share;
    return norm;
}

#if defined(__GNUC__)
/* What a team of threads is to work off: a kernel on some works. */
typedef struct {
    int (*kernel)(const Work *);
    const Work *works;
    int32_t *results;
    int32_t count, next;
} Team;

/* Take one work after the other, as each thread of a team does. */
EXPORT void ivon_join(Team *team) {
    for (int32_t i; (i = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->count;)
        team->results[i] = team->kernel(team->works + i);
}
#endif

/* What is built as an extension has to have this. It is no module, and says so to those who import it. */
extern void *PyExc_ImportError;
extern void PyErr_SetString(void *exception, const char *text);
EXPORT void *PyInit__native(void) {
    PyErr_SetString(PyExc_ImportError, "_native holds kernels and is no module: native.py loads it");
    return 0;
}
