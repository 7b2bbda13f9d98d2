// The choice, made once at load, among the versions of a kernel table.

#pragma once

namespace clipflow {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The one in use: the best that was compiled and that this machine runs, or a test's choice.
InstructionSet instruction_set();
const char* name_of(InstructionSet set);

// For tests. False if there is no such set, or this machine does not run it.
bool use_instruction_set(const char* name);

}  // namespace clipflow

// One table of kernels per instruction set; `type` must be complete and have no inline functions.
#if defined(CLIPFLOW_X86)
#define CLIPFLOW_DECLARE_TABLE(type, table) \
  namespace baseline {                      \
  extern const type table;                  \
  }                                         \
  namespace avx2 {                          \
  extern const type table;                  \
  }                                         \
  namespace avx512 {                        \
  extern const type table;                  \
  }
#define CLIPFLOW_CHOOSE(table)                                               \
  (instruction_set() == InstructionSet::kAvx512  ? avx512::table             \
   : instruction_set() == InstructionSet::kAvx2 ? avx2::table : baseline::table)
#else
#define CLIPFLOW_DECLARE_TABLE(type, table) \
  namespace baseline {                      \
  extern const type table;                  \
  }
#define CLIPFLOW_CHOOSE(table) (baseline::table)
#endif
