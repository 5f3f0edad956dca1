/* mbarriers and bulk tensor copies (TMA). A load is performed when someone waits for its mbarrier, and until then its
 * destination is NaN; a store reads its source where its group is waited for. With the option late off both act at
 * once.
 */
#pragma once
#include "memory.h"

static Mbarrier *mbarrier_at(Machine *m, u32 address) {
  for (int i = 0; i < m->mbarriers; i++)
    if (m->mbarrier[i].address == address && m->mbarrier[i].live) return &m->mbarrier[i];
  return NULL;
}

static void complete_phase(Machine *m, Mbarrier *b) {
  if (b->pending || b->bytes) return;
  b->phase ^= 1;
  b->pending = b->count;
  b->refused = 0;
  m->progress++;
}

/* LOAD: global to shared memory; POISON: NaN into shared memory; SNAPSHOT: shared memory to c->snapshot; WRITE: that to
 * global memory. */
enum { BOX_LOAD, BOX_POISON, BOX_SNAPSHOT, BOX_WRITE };

/* Row `row` of a copy's box: its global address, and the columns [from, to) of it that lie within the tensor. */
static u64 box_row(const Bulk *c, u32 row, i64 *from, i64 *to) {
  const TensorMap *t = c->map;
  u64 at = t->base;
  int inside = 1;
  for (int i = 1; i < t->rank; i++) {
    i64 x = (i64)c->c[i] + row % t->box[i];
    row /= t->box[i];
    inside &= x >= 0 && x < (i64)t->dim[i];
    at += (u64)x * t->stride[i];
  }
  *from = c->c[0] < 0 ? 0 : c->c[0];
  *to = (i64)c->c[0] + t->box[0];
  if (*to > (i64)t->dim[0]) *to = (i64)t->dim[0];
  if (!inside || *to < *from) *to = *from;
  return at + (u64)*from * t->element;
}

static int box_copy(Machine *m, Warp *w, Bulk *c, int how) {
  static const u32 masks[4] = {0, 1, 3, 7};
  const TensorMap *t = c->map;
  u32 row_bytes = t->box[0] * t->element, rows = c->bytes / row_bytes;
  u8 line[4096];
  for (u32 row = 0; row < rows; row++) {
    i64 from, to;
    u64 at = box_row(c, row, &from, &to);
    u32 length = (u32)(to - from) * t->element, skip = (u32)(from - c->c[0]) * t->element;
    u8 *global = NULL, *kept = c->snapshot ? c->snapshot + (size_t)row * row_bytes : NULL;
    if (length && (how == BOX_LOAD || how == BOX_WRITE) && !(global = global_at(m, at, length, how == BOX_WRITE)))
      return bad_global(m, w, c->in, -1, at, length, "tensor copy");
    if (how == BOX_WRITE) {
      if (length) memcpy(global, kept + skip, length);
      continue;
    }
    memset(line, how == BOX_POISON || t->nan_fill ? 0xff : 0, row_bytes);
    if (global) memcpy(line + skip, global, length);
    for (u32 i = 0; i < row_bytes; i += 16) {
      u32 to_shared = c->shared + row * row_bytes + i;
      to_shared ^= (to_shared >> 7 & masks[t->swizzle]) << 4;
      u8 *p = shared_at(m, to_shared, 16);
      if (!p) return bad_shared(m, w, c->in, -1, to_shared, 16, "tensor copy");
      if (m->l->races) note(m, w, c->in, to_shared, 16, how == BOX_SNAPSHOT ? NOTE_ASYNC_READ : NOTE_ASYNC_WRITE);
      if (how == BOX_SNAPSHOT) memcpy(kept + i, p, 16);
      else memcpy(p, line + i, 16);
    }
  }
  return OK;
}

/* Fill in and check what loads and stores have in common. */
static int box_start(Machine *m, Warp *w, const Insn *in, int lane, u64 map, Bulk *c) {
  const TensorMap *t = c->map = (const TensorMap *)map;
  u64 first = (u64)m->l->param, last = first + m->l->param_size;
  if (map < first || map + sizeof *t > last || t->magic != TENSOR_MAP_MAGIC)
    return fail(m, w, in, lane, "no tensor map at 0x%llx", (unsigned long long)map);
  if (t->swizzle && t->box[0] * t->element != 16u << t->swizzle)
    return fail(m, w, in, lane, "not modelled: rows of %u bytes in a swizzled box", t->box[0] * t->element);
  if (t->rank != in->n) return fail(m, w, in, lane, "%d coordinates for a tensor map of rank %d", in->n, t->rank);
  if ((c->shared - SHARED_BASE) % 128)
    return fail(m, w, in, lane, "tensor copy at shared offset %d, no multiple of 128", (i32)(c->shared - SHARED_BASE));
  c->in = in;
  c->warp = w->index;
  c->bytes = t->element;
  for (int i = 0; i < t->rank; i++) {
    c->bytes *= t->box[i];
    c->c[i] = (i32)w->r[m->l->pool[in->ext + i] * LANES + lane];
  }
  return OK;
}

/* For the race detector the write happens when the load was issued, not when it is performed. */
static int deliver_load(Machine *m, Mbarrier *b, Bulk *c) {
  Warp *w = &m->warp[c->warp];
  u32 now[MAX_WARPS];
  memcpy(now, w->clock, sizeof now);
  memcpy(w->clock, c->clock, sizeof now);
  int status = box_copy(m, w, c, BOX_LOAD);
  memcpy(w->clock, now, sizeof now);
  b->bytes -= c->bytes;
  m->progress++;
  complete_phase(m, b);
  return status;
}

/* cp.async.bulk.tensor load: o[0] shared address, imm its offset, o[1] map, o[2] mbarrier; the coordinates in the pool.
 */
static int tma_load(Machine *m, Warp *w, const Insn *in, u32 mask) {
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    Bulk c = {.shared = SLOT(u32, 0)[l] + (u32)in->imm};
    int status = box_start(m, w, in, l, SLOT(u64, 1)[l], &c);
    if (status || (status = box_copy(m, w, &c, BOX_POISON))) return status;
    Mbarrier *b = mbarrier_at(m, SLOT(u32, 2)[l]);
    if (!b) return fail(m, w, in, l, "tensor load with an mbarrier that is not initialised");
    memcpy(c.clock, w->clock, sizeof c.clock);
    join_clock(b->clock, w->clock, m->l->warps);
    w->clock[w->index]++;
    if (!m->l->late) {
      if ((status = deliver_load(m, b, &c))) return status;
      continue;
    }
    GROW(b->queue, b->queued, b->cap_queue);
    b->queue[b->queued++] = c;
  }
  return OK;
}

/* Read the source of a store unless that is done; then, if asked for, write it. */
static int finish_store(Machine *m, Warp *w, Bulk *c, int writes) {
  int status = OK;
  if (!c->snapshot) {
    c->snapshot = malloc(c->bytes);
    status = box_copy(m, w, c, BOX_SNAPSHOT);
  }
  if (status || !writes) return status;
  status = box_copy(m, w, c, BOX_WRITE);
  free(c->snapshot);
  c->snapshot = NULL;
  return status;
}

/* cp.async.bulk.tensor store: o[0] map, o[1] shared address, imm its offset; the coordinates in the pool. */
static int tma_store(Machine *m, Warp *w, const Insn *in, u32 mask) {
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    Bulk c = {.shared = SLOT(u32, 1)[l] + (u32)in->imm, .group = w->bulk_group};
    int status = box_start(m, w, in, l, SLOT(u64, 0)[l], &c);
    if (!status && !m->l->late) status = finish_store(m, w, &c, 1);
    if (!status && m->l->late && m->l->races) { /* the source counts as read from now on */
      status = finish_store(m, w, &c, 0);
      free(c.snapshot);
      c.snapshot = NULL;
    }
    if (status) return status;
    if (!m->l->late) continue;
    GROW(w->bulk, w->nbulk, w->cap_bulk);
    w->bulk[w->nbulk++] = c;
  }
  return OK;
}

/* read_only: the sources may be overwritten, the results need not be visible yet. */
static int wait_bulk(Machine *m, Warp *w, u32 pending, int read_only) {
  int kept = 0, status;
  for (int i = 0; i < w->nbulk; i++) {
    Bulk *c = &w->bulk[i];
    int due = w->bulk_group - c->group > pending;
    if (due && (status = finish_store(m, w, c, !read_only))) return status;
    if (!due || read_only) w->bulk[kept++] = *c;
  }
  w->nbulk = kept;
  return OK;
}

static int init_mbarrier(Machine *m, Warp *w, const Insn *in, int lane, u32 at, u32 count) {
  int i = 0;
  while (i < m->mbarriers && m->mbarrier[i].live) i++;
  if (mbarrier_at(m, at)) return fail(m, w, in, lane, "mbarrier initialised twice");
  if (!shared_at(m, at, 8) || at % 8) return bad_shared(m, w, in, lane, at, 8, "mbarrier");
  if (i == MAX_MBARRIERS) return fail(m, w, in, lane, "more than %d mbarriers", MAX_MBARRIERS);
  if (m->l->races) note(m, w, in, at, 8, NOTE_WRITE);
  if (i == m->mbarriers) m->mbarriers++;
  Mbarrier *b = &m->mbarrier[i];
  *b = (Mbarrier){.address = at, .count = (i32)count, .pending = (i32)count, .live = 1, .queue = b->queue,
                  .cap_queue = b->cap_queue};
  return OK;
}

/* Whether a wait for the phase of that parity is to be told, once for each warp, that it is not over yet. */
static int refuses(Machine *m, const Warp *w, Mbarrier *b, u32 parity) {
  u32 me = 1u << w->index;
  if (!m->l->late || !b->queued || b->refused & me || b->phase != parity) return 0;
  b->refused |= me;
  m->progress++;
  return 1;
}

static int wait_mbarrier(Machine *m, Warp *w, Mbarrier *b, u32 parity, int *done) {
  while (b->phase == parity && b->queued) {
    Bulk c = b->queue[0];
    memmove(b->queue, b->queue + 1, (size_t)--b->queued * sizeof *b->queue);
    int status = deliver_load(m, b, &c);
    if (status) return status;
  }
  *done = b->phase != parity;
  if (*done) join_clock(w->clock, b->clock, m->l->warps);
  return OK;
}

enum { MB_INIT, MB_INVAL, MB_ARRIVE, MB_EXPECT_TX, MB_ARRIVE_EXPECT_TX, MB_WAIT };

static int arrive(Machine *m, Warp *w, const Insn *in, int lane, Mbarrier *b, i32 arrivals) {
  if (b->pending < arrivals)
    return fail(m, w, in, lane, "more arrivals at an mbarrier than the %d it expects", b->count);
  b->pending -= arrivals;
  join_clock(b->clock, w->clock, m->l->warps);
  w->clock[w->index]++;
  m->progress++;
  complete_phase(m, b);
  return OK;
}

/* mbarrier.*: o[0] address, imm its offset, o[1] operand or -1, o[2] the predicate of a wait; kind MB_*. */
static int mbarrier(Machine *m, Warp *w, const Insn *in, u32 mask) {
  int status = OK, yields = 0;
  for (int l = 0; l < LANES && !status; l++) {
    if (!(mask >> l & 1)) continue;
    u32 at = SLOT(u32, 0)[l] + (u32)in->imm, x = in->o[1] < 0 ? 1 : SLOT(u32, 1)[l];
    Mbarrier *b = mbarrier_at(m, at);
    int done = 0;
    if (in->kind == MB_INIT) {
      status = init_mbarrier(m, w, in, l, at, x);
      continue;
    }
    if (!b) return fail(m, w, in, l, "mbarrier at shared offset %d is not initialised", (i32)(at - SHARED_BASE));
    switch (in->kind) {
      case MB_INVAL:
        if (b->queued) return fail(m, w, in, l, "mbarrier invalidated with %d tensor loads in flight", b->queued);
        b->live = 0;
        if (m->l->races) note(m, w, in, at, 8, NOTE_WRITE);
        break;
      case MB_EXPECT_TX: b->bytes += x; break;
      case MB_ARRIVE_EXPECT_TX: b->bytes += x; status = arrive(m, w, in, l, b, 1); break;
      case MB_ARRIVE: status = arrive(m, w, in, l, b, (i32)x); break;
      default:
        if (refuses(m, w, b, x & 1)) {
          put_predicate(w, in->o[2], mask, 0);
          return YIELD;
        }
        status = wait_mbarrier(m, w, b, x & 1, &done);
        put_predicate(w, in->o[2], 1u << l, done ? FULL : 0);
        yields |= !done;
    }
  }
  return status ? status : yields ? YIELD : OK;
}
