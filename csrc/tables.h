// The torch side of a PlanView: chunk tables, rows of addresses and workspace over tensor lists.
#pragma once
#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "cpu/harness.h"
#include "plan.h"

namespace samkern {

// torch's own threads, so that torch.set_num_threads counts here too.
cpu::Pool torch_pool();

Dtype dtype_of(const at::Tensor& x);  // TypeError for dtypes that no kernel takes
bool is_supported(at::ScalarType dtype);

// Same shape and, where a dimension has more than one entry, same strides: element i of one is element i of the other.
bool same_layout(const at::Tensor& a, const at::Tensor& b);

// Whether list ops take these lists as they are: equally long, shapes of the first, on the device of the first,
// supported dtypes; those that are written also dense and in the first one's layout. A quick yes; samkern/ops finds
// out what is wrong.
bool lists_fit(const std::vector<std::vector<at::Tensor>>& lists, size_t n_written);

Operand operand(const at::Tensor& x);

// As operand(), but x has the layout of `like`: copied into it if need be, and the copy is kept in `copies`.
Operand operand_like(const at::Tensor& x, const at::Tensor& like, std::vector<at::Tensor>& copies);

constexpr size_t kNRows = 11;  // of operands in a PlanView

// The one dtype of all weights and of the gradients that are bound, for which a GPU has kernels of its own; or -1.
int32_t common_dtype(const PlanView& plan);

class Tables {
 public:
  // `like`: dense tensors whose shapes and layouts all operands share. `group`: row of options of each. `chunk`:
  // elements.
  Tables(at::TensorList like, std::vector<int32_t> group, int64_t chunk = kChunk);
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;

  // Allocates the tables of filters, which only a filter-wise climb reads.
  void use_filters();

  int64_t n_bytes() const;  // of all tables on the host

  size_t n_filters() const { return static_cast<size_t>(n_filters_); }

  PlanView view{};

 private:
  void add_tensor(const at::Tensor& like, int32_t index);

  std::vector<Operand> operands_;
  std::vector<uint8_t> fresh_;
  std::vector<int64_t> numel_, flat_, slices_, chunk_cost_;
  std::vector<int32_t> group_, chunk_tensor_, chunk_index_, first_chunk_, first_dim_;
  std::vector<Dim> dims_;
  std::vector<Filters> filters_;
  std::vector<FilterRun> filter_runs_;
  std::vector<double> workspace_, filter_sums_;
  int64_t n_filters_ = 0, n_slices_ = 0, chunk_;
};

}  // namespace samkern
