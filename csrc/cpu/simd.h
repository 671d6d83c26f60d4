// One source, three instruction sets: the loader picks AVX-512, AVX2 or baseline x86-64 once.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTREMEDY_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTREMEDY_CLONES
#endif
