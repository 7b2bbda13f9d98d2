#include "common/instruction_set.h"

#include <cstring>
#include <initializer_list>

namespace clipflow {

namespace {

InstructionSet best() {
#if defined(CLIPFLOW_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return InstructionSet::kAvx512;
  if (avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

InstructionSet& in_use() {
  static InstructionSet set = best();
  return set;
}

}  // namespace

InstructionSet instruction_set() { return in_use(); }

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

bool use_instruction_set(const char* name) {
  for (auto set : {InstructionSet::kBaseline, InstructionSet::kAvx2, InstructionSet::kAvx512}) {
    if (std::strcmp(name, name_of(set)) != 0 || set > best()) continue;
    in_use() = set;
    return true;
  }
  return false;
}

}  // namespace clipflow
