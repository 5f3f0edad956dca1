/* Data races, by happens-before.
 *
 * Shared memory: vector clocks of warps (after FastTrack, Flanagan and Freund 2009), in granules of 2 bytes. Warps are
 * ordered by bar.sync and by mbarriers, from arriving to waiting. Every access is checked against the last write and
 * against each other warp's last read. An asynchronous operation counts as an access of the warp that issued it, where
 * it is issued and where it is waited for. Lanes of one warp are taken to run in lockstep. Two stores of the same bytes
 * are no race: where a layout has more threads than elements, Triton lets several warps store the same.
 *
 * What the async proxy reads (sources of TMA stores, operands of wgmma) also needs a fence.proxy.async after a generic
 * write: by the writer, or by the reader once it has synchronised with the writer. By the letter of the PTX ISA that
 * holds for what cp.async wrote as well; Triton and CUTLASS leave it out there, and so does this detector.
 *
 * Global memory: nothing orders two CTAs of a launch, so none may touch a byte that another one writes, but by atomics.
 */
#pragma once
#include "machine.h"

enum { NOTE_READ, NOTE_ASYNC_READ, NOTE_SAME_WRITE, NOTE_WRITE, NOTE_ASYNC_WRITE, NOTE_COPY_WRITE, NOTE_ATOMIC };
enum {
  RACE_WRITE_WRITE, RACE_WRITE_READ, RACE_READ_WRITE, RACE_PROXY,
  RACE_CTA_WRITES, RACE_CTA_WRITE_READ, RACE_CTA_READ_WRITE
};

static void report(Machine *m, int kind, u32 line_a, u32 line_b, i32 warp_a, i32 warp_b, u64 at) {
  Launch *l = m->l;
  for (int i = 0; i < l->nrace; i++)
    if (l->race[i].kind == kind && l->race[i].line_a == (i32)line_a && l->race[i].line_b == (i32)line_b) return;
  if (l->nrace < MAX_RACES)
    l->race[l->nrace++] = (Race){kind, (i32)line_a, (i32)line_b, warp_a, warp_b, at, m->cta};
}

static void join_clock(u32 *into, const u32 *from, int warps) {
  for (int i = 0; i < warps; i++)
    if (from[i] > into[i]) into[i] = from[i];
}

/* Whether a proxy fence lies between the last write to s and a read by w through the async proxy. */
static int fenced(const Machine *m, const Warp *w, const Shadow *s) {
  return m->warp[s->warp].fences > s->fences || w->fenced[s->warp] >= s->clock;
}

/* Note an access of `size` bytes of shared memory from address `at` on. */
static void note(Machine *m, const Warp *w, const Insn *in, u32 at, u32 size, int how) {
  u32 first = (at - SHARED_BASE) >> 1, last = (at + size - 1 - SHARED_BASE) >> 1, line = (u32)in->line;
  int writes = how >= NOTE_SAME_WRITE;
  for (u32 granule = first; granule <= last; granule++) {
    Shadow *s = &m->shadow[granule];
    int both_atomic = how == NOTE_ATOMIC && s->atomic, foreign = s->line && s->warp != w->index;
    if (foreign && s->clock > w->clock[s->warp] && !both_atomic && how != NOTE_SAME_WRITE)
      report(m, writes ? RACE_WRITE_WRITE : RACE_WRITE_READ, s->line, line, s->warp, w->index, at);
    if (how == NOTE_ASYNC_READ && s->line && s->generic && !fenced(m, w, s))
      report(m, RACE_PROXY, s->line, line, s->warp, w->index, at);
    if (!writes) {
      s->read_clock[w->index] = w->clock[w->index];
      s->read_line[w->index] = line;
      continue;
    }
    for (int i = 0; i < m->l->warps; i++)
      if (i != w->index && s->read_clock[i] > w->clock[i] && !both_atomic)
        report(m, RACE_READ_WRITE, s->read_line[i], line, i, w->index, at);
    s->clock = w->clock[w->index];
    s->line = line;
    s->warp = (u8)w->index;
    s->generic = how != NOTE_ASYNC_WRITE && how != NOTE_COPY_WRITE;
    s->atomic = how == NOTE_ATOMIC;
    s->fences = w->fences;
  }
}

/* Note an access of `size` bytes of the range r from address `at` on. */
static void note_global(Machine *m, int r, u64 at, u32 size, int writes) {
  u32 me = (u32)m->cta + 1, line = (u32)m->now->line;
  u64 first = at - m->l->range[r].start;
  for (u64 i = first; i < first + size; i++) {
    u32 *writer = &m->global_shadow[r].writer[i], *reader = &m->global_shadow[r].reader[i];
    int written = *writer && *writer != me;
    if (m->atomic_now) {
      if (written && *writer != ATOMIC) report(m, RACE_CTA_WRITES, 0, line, (i32)*writer - 1, -1, at);
      *writer = ATOMIC;
    } else if (writes) {
      if (written) report(m, RACE_CTA_WRITES, 0, line, (i32)*writer - 1, -1, at);
      else if (*reader && *reader != me) report(m, RACE_CTA_READ_WRITE, 0, line, (i32)*reader - 1, -1, at);
      *writer = me;
    } else {
      if (written) report(m, RACE_CTA_WRITE_READ, 0, line, (i32)*writer - 1, -1, at);
      *reader = *reader && *reader != me ? SEVERAL : me;
    }
  }
}
