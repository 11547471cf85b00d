// The shapes of one call, which operators and kernels share.
#pragma once

namespace deform_attn {

constexpr int MAX_LEVELS = 64;

struct Level { int W, H, start; };  // start: its first token

// Letters as in __init__.py. B, N, h * c, Q and L * P are below 2^31. Goes to a GPU by value, with the launch.
struct Problem {
  int B, N, h, c, Q, L, P;
  bool boxes;  // whether the reference holds boxes [B Q 4] and not points [Q 2]
  Level levels[MAX_LEVELS];
};

}  // namespace deform_attn
