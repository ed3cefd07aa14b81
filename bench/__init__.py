"""Micro-benchmarks: `make bench`. Every pass and every half-step against its peers, interleaved, checked before timed."""
