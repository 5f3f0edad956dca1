/* Helpers of the expressions in ops.def. */
#pragma once
#include "machine.h"

static inline f32 as_f32(u32 x) {
  f32 y;
  memcpy(&y, &x, 4);
  return y;
}
static inline u32 as_u32(f32 x) {
  u32 y;
  memcpy(&y, &x, 4);
  return y;
}
/* Subnormals to zeros of their sign, as .ftz does to operands and results. */
static inline f32 ftz(f32 x) {
  u32 bits = as_u32(x);
  return bits & 0x7f800000u ? x : as_f32(bits & 0x80000000u);
}
/* Of a NaN and a number the number; -0 is less than +0. */
static inline f32 min_f32(f32 a, f32 b) {
  return a != a ? b : b != b ? a : a == b ? as_f32(as_u32(a) | as_u32(b)) : a < b ? a : b;
}
static inline f32 max_f32(f32 a, f32 b) {
  return a != a ? b : b != b ? a : a == b ? as_f32(as_u32(a) & as_u32(b)) : a > b ? a : b;
}
static inline f64 min_f64(f64 a, f64 b) { return a != a ? b : b != b ? a : a < b ? a : b; }
static inline f64 max_f64(f64 a, f64 b) { return a != a ? b : b != b ? a : a > b ? a : b; }

static inline f64 half_bf16(u32 x) { return as_f32(x << 16); }
static inline f64 half_f16(u32 x) {
  u32 exponent = x >> 10 & 31, fraction = x & 0x3ff;
  f64 sign = x & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexp(1024 + fraction, (int)exponent - 25) : ldexp(fraction, -24));
}
/* From f64 in one rounding: an f32 in between that keeps a sticky bit (round to odd) makes the second one exact. */
static inline u32 to_odd_f32(f64 x) {
  f32 y = (f32)x;
  u32 bits = as_u32(y);
  if (x != x || (f64)y == x || y - y != 0) return bits;
  if (((f64)y > x) == (x > 0)) bits -= 1;
  return bits | 1;
}
static inline u32 to_bf16(f64 x) {
  if (x != x) return 0x7fffu;
  u32 bits = to_odd_f32(x);
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
static inline u32 to_f16(f64 x) {
  if (x != x) return 0x7fffu;
  u32 sign = signbit(x) ? 0x8000u : 0;
  f64 size = fabs(x);
  if (size < 0x1p-14) return sign | (u32)nearbyint(size * 0x1p24); /* subnormal; rounds up to the first normal */
  if (size >= 65520) return sign | 0x7c00u;
  u32 bits = to_odd_f32(size) - ((127u - 15u) << 23);
  return sign | (bits + 0xfffu + (bits >> 13 & 1)) >> 13;
}
/* mode: 0 to nearest, 1 towards zero, 2 down, 3 up. */
static inline f64 round_mode(f64 x, u8 mode) {
  return mode == 0 ? nearbyint(x) : mode == 1 ? trunc(x) : mode == 2 ? floor(x) : ceil(x);
}
static inline i32 to_i32(f64 x) { return x != x ? 0 : x <= -0x1p31 ? INT32_MIN : x >= 0x1p31 ? INT32_MAX : (i32)x; }
static inline i64 to_i64(f64 x) {
  return x != x ? INT64_MIN : x <= -0x1p63 ? INT64_MIN : x >= 0x1p63 ? INT64_MAX : (i64)x;
}
static inline u32 to_u32(f64 x) { return x != x || x <= 0 ? 0 : x >= 0x1p32 ? FULL : (u32)x; }

/* Bits `position` .. `position + length` of a, zero- or sign-extended. */
static inline u32 bfe_u32(u32 a, u32 position, u32 length) {
  if (length == 0 || position > 31) return 0;
  u32 x = a >> position;
  return length > 31 ? x : x & ((1u << length) - 1);
}
static inline u32 bfe_s32(u32 a, u32 position, u32 length) {
  if (length == 0) return 0;
  if (position > 31) return (u32)((i32)a >> 31);
  u32 end = position + length > 32 ? 32 : position + length;
  return (u32)((i32)(a << (32 - end)) >> (32 - (end - position)));
}
/* A byte of (b, a) for each four bits of c, or its sign eight times. */
static inline u32 prmt(u32 a, u32 b, u32 c) {
  u64 bytes = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    u32 select = c >> 4 * i & 15, byte = (u32)(bytes >> 8 * (select & 7)) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}
/* Any function of three bits, by its table. */
static inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 out = 0;
  for (u32 i = 0; i < 8; i++)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}
