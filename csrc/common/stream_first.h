// Part of a register, or all of it, stored into the caches or past them; as common/stream.h.

#pragma once

#include "common/lanes.h"
#include "common/stream.h"

namespace clipflow {
namespace {

// Whether stream() may write registers from `to` on.
template <typename T>
CLIPFLOW_INLINE bool can_stream(const T* to) {
  constexpr uint64_t kBytes = kLanes<typename Wide<T>::Lanes> * sizeof(T);
  return reinterpret_cast<uint64_t>(to) % kBytes == 0;
}

// As store_first(), but whole registers go past the caches where `streamed`.
template <typename T>
CLIPFLOW_INLINE void stream_first(T* to, typename Wide<T>::Lanes value, int64_t count,
                                  bool streamed) {
  if (streamed && count == kLanes<typename Wide<T>::Lanes>)
    stream(to, value);
  else
    store_first(to, value, count);
}

}  // namespace
}  // namespace clipflow
