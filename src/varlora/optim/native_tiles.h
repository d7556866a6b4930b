/* The loops of native.c over tiles of 64 elements, for one kind of processor. Included once for each, after

   FOR          attribute of functions compiled for it
   NAME(f)      f with its suffix
   VECTOR       numbers of 64 bits that it multiplies at once
   TIMES(x, c)  the products of the lower halves of x with a constant of 32 bits */

/* Philox4x32-10 at the 16 counters of a tile. A word lies in the lower half of 64 bits, with anything in the upper. */
FOR INLINE void NAME(philox)(uint64_t key, int64_t position, int64_t tile, uint64_t words[4][LANES]) {
    enum { N = 8 * LANES / sizeof(VECTOR) };
    VECTOR a[N], b[N], c[N], d[N];
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int l = 0; l < LANES; l++) {
        words[0][l] = (uint64_t)tile * LANES + (uint64_t)l;
        words[1][l] = (uint64_t)tile * LANES >> 32;
        words[2][l] = (uint64_t)position;
        words[3][l] = (uint64_t)position >> 32;
    }
    memcpy(a, words[0], sizeof a);
    memcpy(b, words[1], sizeof b);
    memcpy(c, words[2], sizeof c);
    memcpy(d, words[3], sizeof d);
    for (int round = 0; round < 10; round++) {
        for (int l = 0; l < N; l++) {
            VECTOR p = TIMES(a[l], 0xD2511F53u), q = TIMES(c[l], 0xCD9E8D57u);
            a[l] = (q >> 32) ^ b[l] ^ k0;
            b[l] = q;
            c[l] = (p >> 32) ^ d[l] ^ k1;
            d[l] = p;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    memcpy(words[0], a, sizeof a);
    memcpy(words[1], b, sizeof b);
    memcpy(words[2], c, sizeof c);
    memcpy(words[3], d, sizeof d);
}

FOR INLINE void NAME(normal_tile)(uint64_t key, int64_t position, int64_t tile, float eps[TILE]) {
    uint64_t words[4][LANES];
    NAME(philox)(key, position, tile, words);
    for (int l = 0; l < LANES; l++)
        box_muller((uint32_t)words[0][l], (uint32_t)words[1][l], eps + l, eps + LANES + l);
    for (int l = 0; l < LANES; l++)
        box_muller((uint32_t)words[2][l], (uint32_t)words[3][l], eps + 2 * LANES + l, eps + 3 * LANES + l);
}

/* Call `some` for the tiles of all segments, with their noise if `drawn`. */
FOR INLINE void NAME(over_tiles)(const Work *work, int drawn, Some some) {
    for (const Segment *of = work->segments; of < work->segments + work->count; of++) {
        for (int64_t i = 0; i < of->count;) {
            float eps[TILE] = {0};
            int64_t index = of->first + i, left = of->count - i;
            int within = (int)(index % TILE), n = TILE - within;
            if (drawn) NAME(normal_tile)(work->key, of->position, index / TILE, eps);
            if (n > left) n = (int)left;
            if (n == TILE) /* said apart, so that the usual case has a fixed length */
                some(work, of, i, TILE, eps);
            else
                some(work, of, i, n, eps + within);
            i += n;
        }
    }
}

FOR static void NAME(normal)(const Work *work) { NAME(over_tiles)(work, 1, normal_some); }
FOR static void NAME(draw)(const Work *work) { NAME(over_tiles)(work, 1, draw_some); }
FOR static void NAME(price)(const Work *work) { NAME(over_tiles)(work, 1, price_some); }
FOR static void NAME(gradsq)(const Work *work) { NAME(over_tiles)(work, 0, gradsq_some); }

#undef FOR
#undef NAME
#undef VECTOR
#undef TIMES
