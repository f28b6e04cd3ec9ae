// The global norm of the gradients that a plan has taken. It reads each gradient once. Threads take
// the same pieces as in the sweep, and the results are added in the order of the pieces, so the
// number of threads does not change the result.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "rounding.h"
#include "sweep.h"

namespace onepass::cpu {

Norm norm(const Kernels& kernels, const std::vector<Entry>& entries, const std::vector<Cut>& cuts) {
  const int64_t pieces = static_cast<int64_t>(cuts.size()) - 1;
  std::vector<Norm> partial(std::max<int64_t>(pieces, 0));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pieces);
  Runs runs(pieces, threads);
  const auto work = [&](int64_t, int64_t) {
    DefaultRounding rounding;
    runs.work([&](int64_t piece) {
      Norm found{};
      for_each_part(entries, cuts, piece, [&](int64_t e, int64_t begin, int64_t end) {
        const Entry& entry = entries[e];
        const int64_t size = entry.grad_format == Format::kFp32 ? 4 : 2;
        kernels.norm[static_cast<int>(entry.grad_format)](
            static_cast<const char*>(entry.grad) + begin * size, end - begin, &found);
      });
      partial[piece] = found;
    });
  };
  if (threads <= 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, work);
  DefaultRounding rounding;
  Norm total{};
  for (const Norm& part : partial) {
    total.squares += part.squares;
    total.largest = std::max(total.largest, part.largest);
    total.nonfinite += part.nonfinite;
  }
  return total;
}

}  // namespace onepass::cpu
