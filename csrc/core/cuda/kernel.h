// The device layer of fusee: what a .cu file includes, and the only way its kernels reach memory.
#pragma once

#include "core/cuda/fragments.h"
#include "core/cuda/launch.h"
#include "core/cuda/memory.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"
#include "core/cuda/shared.h"
