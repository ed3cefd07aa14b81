// A product that does not commute, folded through the grid barrier round by round. In round r block b contributes a
// matrix that depends on r, b and the product so far; after the barrier every block multiplies all of them in the order
// of the blocks, and that is the product so far. One stale or early read in any round changes every later one.
//
// tests/barrier_stress.py has the formulas; test_cuda.py runs this by fibers, test_gpu.py on a GPU.
#include "../csrc/cuda/device.h"

namespace samkern {
namespace {

struct StressArgs {
  double* matrices;  // [2][n_blocks][4] whole numbers below 2^32, by turns: nobody writes what others still read
  double* products;  // [n_blocks][4] what each block arrived at
  int32_t n_rounds;
};

// 2x2, row by row, modulo 2^32.
struct Matrix {
  uint32_t a, b, c, d;
};

SAMKERN_DEVICE Matrix times(const Matrix& x, const Matrix& y) {
  return {x.a * y.a + x.b * y.c, x.a * y.b + x.b * y.d, x.c * y.a + x.d * y.c, x.c * y.b + x.d * y.d};
}

// Its determinant is 1: products do not run into zeros.
SAMKERN_DEVICE Matrix contribution(uint32_t round, uint32_t block, const Matrix& so_far) {
  const uint32_t x = (so_far.b + round) * 2654435761U + block * 2246822519U;
  const uint32_t y = (so_far.c + block) * 3266489917U + round * 668265263U;
  return {1 + x * y, x, y, 1};
}

SAMKERN_DEVICE void put(double* to, const Matrix& x) {
  to[0] = x.a;
  to[1] = x.b;
  to[2] = x.c;
  to[3] = x.d;
}

SAMKERN_DEVICE Matrix get(const double* from) {
  return {static_cast<uint32_t>(device::read_shared(from)), static_cast<uint32_t>(device::read_shared(from + 1)),
          static_cast<uint32_t>(device::read_shared(from + 2)), static_cast<uint32_t>(device::read_shared(from + 3))};
}

// The matrices of all blocks, multiplied in order by one thread; the others fetch them. All threads get the product.
SAMKERN_DEVICE Matrix fold(const double* matrices, int folder) {
  Matrix* tile = device::shared<Matrix, device::kThreads, 0>();
  Matrix* product = device::shared<Matrix, 1, 1>();
  Matrix so_far{1, 0, 0, 1};
  for (int first = 0; first < device::n_blocks(); first += device::kThreads) {
    const int left = device::n_blocks() - first, n = left < device::kThreads ? left : device::kThreads;
    if (device::thread() < n) tile[device::thread()] = get(matrices + 4 * int64_t{first + device::thread()});
    device::block_sync();
    if (device::thread() == folder) {
      for (int i = 0; i < n; ++i) so_far = times(so_far, tile[i]);
    }
    device::block_sync();  // the tile is read
  }
  if (device::thread() == folder) *product = so_far;
  device::block_sync();
  so_far = *product;
  device::block_sync();  // the product is read
  return so_far;
}

// Who writes and who folds changes from round to round: the barrier has to order the accesses of every thread.
SAMKERN_KERNEL barrier_stress_kernel(SAMKERN_ARGUMENT StressArgs args) {
  Matrix so_far{1, 0, 0, 1};
  for (int32_t r = 0; r < args.n_rounds; ++r) {
    double* matrices = args.matrices + 4 * int64_t{device::n_blocks()} * (r % 2);
    if (device::thread() == r * 7 % device::kThreads) {
      const auto round = static_cast<uint32_t>(r), block = static_cast<uint32_t>(device::block());
      put(matrices + 4 * int64_t{device::block()}, contribution(round, block, so_far));
    }
    device::grid_sync();
    so_far = fold(matrices, r * 5 % device::kThreads);
  }
  if (device::thread() == 0) put(args.products + 4 * int64_t{device::block()}, so_far);
}

}  // namespace
}  // namespace samkern

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Returns null, or why the launch failed.
EXPORTED const char* samkern_barrier_stress(double* matrices, double* products, int32_t n_blocks, int32_t n_rounds,
                                            void* stream) {
  const samkern::StressArgs args{matrices, products, n_rounds};
  return samkern::device::launch(samkern::barrier_stress_kernel, args, n_blocks, true, {stream, true});
}

// Blocks that the current device holds at the same time: a grid of one more is refused.
EXPORTED int32_t samkern_barrier_stress_blocks() {
#if defined(SAMKERN_ON_CPU)
  return samkern::device::Machine::get().setting.n_blocks;
#else
  int device = 0, n_processors = 0, n_per_processor = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
                     cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_per_processor, samkern::barrier_stress_kernel,
                                                                   samkern::device::kThreads, 0) == cudaSuccess;
  return known ? n_processors * n_per_processor : 0;
#endif
}
