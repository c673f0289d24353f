/*
 * dedup-share: what libFuzzer calls
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_STRESS_FUZZ_H
#define TESTS_STRESS_FUZZ_H

/* LLVM, "libFuzzer": run one input; 0. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif /* TESTS_STRESS_FUZZ_H */
