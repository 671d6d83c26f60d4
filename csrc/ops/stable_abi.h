// First include of every file here: torch 2.10's feature level of the stable ABI, so that the
// library loads on torch 2.11 and everything newer. Not a compiler flag, because csrc/host includes
// DLPack's header, which torch refuses under it.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000
#define TORCH_STABLE_ONLY
