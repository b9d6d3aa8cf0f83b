// SPDX-License-Identifier: Apache-2.0
// What a method asks of a kernel. These are the defaults, with which every file compiles alone; cupy_router puts the
// values of a call in their place, so that a step that is not asked for is not compiled. docs/methods.md has the steps.
#pragma once

#include "device/types.cuh"

enum Score { IDENTITY, SIGMOID, SQRTSOFTPLUS, SOFTMAX, OWN };  // OWN: routing/score_function.cuh

// -- Switches ---------------------------------------------------------------------------------------------------------

// Experts of a token.
SPECIALISED int NUM_EXPERTS = 256;  // 0: unknown, any id that int32 holds; for hash tables without a method
SPECIALISED int TOP_K = 6;
SPECIALISED int NUM_SHARED = 0;          // shared experts, which every token has besides
SPECIALISED bool SHARED_LOGITS = false;  // logits have columns of the shared experts, which share the normaliser

// From logits to scores.
SPECIALISED bool HAS_LOGIT_BIAS = false;
SPECIALISED bool LOGIT_SCALED = false;  // logit_scale is not 1
SPECIALISED bool LOGIT_CAPPED = false;  // there is a logit_softcap
SPECIALISED Score SCORE = SQRTSOFTPLUS;
SPECIALISED bool SCORE_AFTER_TOPK = false;  // logits are selected, and only the chosen ones scored

// Selection.
SPECIALISED bool HAS_BIAS = false;
SPECIALISED bool SELECT_ON_LOGITS = false;
SPECIALISED int NUM_GROUPS = 0;       // 0: all experts can be chosen
SPECIALISED int TOP_GROUPS = 1;       // groups that experts can be chosen from
SPECIALISED bool GROUP_TOP2 = false;  // a group is worth the sum of its best two; else its best

// From scores to weights.
SPECIALISED bool RENORMALIZE = true;
SPECIALISED bool HAS_EPS = false;  // renormalize_eps is not 0
SPECIALISED bool HAS_MIN = false;  // there is a renormalize_min
SPECIALISED bool HAS_EXPERT_SCALE = false;
SPECIALISED int RESULT_DTYPE = 0;         // of the weights
SPECIALISED int INDEX_BYTES = 4;          // of the indices
SPECIALISED bool INDEX_UNSIGNED = false;  // their highest value stands for -1

// -- Numbers ----------------------------------------------------------------------------------------------------------

// A parameter of every kernel that knows methods.
struct MethodNumbers {
    float renormalize_eps;
    float renormalize_min;  // -inf: none
    float scale;            // of all weights
    float logit_scale;
    float logit_softcap;  // 0: none
    float shared_weight;  // of each shared expert, unless it has a logit
};
