// Pairs of a token and an expert, sorted by expert. Torch-free, the same at every CPU level.
#pragma once

#include <cstdint>

namespace effk::moe {

// A stable counting sort. ids [pairs], of which -1 comes last; perm [pairs]: which pair is at each place; inverse
// [pairs] or null: the place of each pair; ends [experts]: of each expert's places. Gives the first pair whose id is
// out of range, having written nothing but ends, or -1.
template <class Ids>
inline int64_t sort_pairs(const Ids& ids, int64_t pairs, int64_t experts, int64_t* perm, int64_t* inverse,
                          int64_t* ends) {
  for (int64_t e = 0; e < experts; ++e) ends[e] = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t id = ids[i];
    if (id < -1 || id >= experts) return i;
    if (id >= 0) ++ends[id];
  }
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t count = ends[e];
    ends[e] = begin;
    begin += count;
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t id = ids[i], at = id < 0 ? begin++ : ends[id]++;
    perm[at] = i;
    if (inverse) inverse[i] = at;
  }
  return -1;
}

}  // namespace effk::moe
