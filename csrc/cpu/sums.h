// Sums over one block of values, in double, with lanes added in a fixed order.
#pragma once
#include <cstdint>

namespace samkern::cpu {

double sum_squares(const float* a, int64_t n);
double sum_squares(const double* a, int64_t n);
double sum_products(const float* a, const float* b, int64_t n);
double sum_products(const double* a, const double* b, int64_t n);

// Of (a - b) (c - d), with differences rounded to their type.
double sum_difference_products(const float* a, const float* b, const float* c, const float* d, int64_t n);
double sum_difference_products(const double* a, const double* b, const double* c, const double* d, int64_t n);

}  // namespace samkern::cpu
