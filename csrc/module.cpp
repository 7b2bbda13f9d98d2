// The Python module clipflow._C. Importing it registers the compiled ops (each in its own file);
// the module itself only says how it was built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/instruction_set.h"

namespace clipflow {
namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(' ', begin), list.size());
    parts.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["compiler"] = CLIPFLOW_COMPILER;
  facts["cuda_compiler"] = CLIPFLOW_CUDA_COMPILER;
  facts["cuda_archs"] = split(CLIPFLOW_CUDA_ARCHS);
  facts["torch_built_with"] = CLIPFLOW_TORCH_VERSION;
#if defined(CLIPFLOW_X86)
  facts["instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  facts["instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
  facts["instruction_set"] = name_of(instruction_set());
  return facts;
}

}  // namespace
}  // namespace clipflow

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of clipflow, registered with PyTorch at import, and build facts.";
  m.def("build_facts", &clipflow::build_facts,
        "How this extension was built, and which instruction set this machine runs.");
  m.def("use_instruction_set", &clipflow::use_instruction_set,
        "Run the CPU kernels of another instruction set, for tests; False if it cannot.");
}
