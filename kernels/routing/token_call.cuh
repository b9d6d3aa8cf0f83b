// SPDX-License-Identifier: Apache-2.0
// What a call of route_tokens.cuh is specialised for, and its parameters.
#pragma once

#include "device/vector8.cuh"
#include "device/num_valid.cuh"
#include "routing/replicas.cuh"
#include "routing/weigh.cuh"

enum Source { UNIFORM, LOGITS, PRODUCTS };  // of the weights

SPECIALISED Source SOURCE = LOGITS;
SPECIALISED bool BY_TOKEN_ID = true;  // else the table has a row for each token
SPECIALISED int TOKEN_ID_BYTES = 4;
SPECIALISED int TABLE_BYTES = 4;
SPECIALISED bool TABLE_UNSIGNED = false;
SPECIALISED bool KEEPS_UNSET = false;  // results of tokens whose entries are all -1 are left as they are
SPECIALISED int DTYPE = 0;             // of the logits, or of x
SPECIALISED int WEIGHT_DTYPE = DTYPE;  // of the gate
SPECIALISED int LANES = 8;
SPECIALISED int WARPS = 8;           // of a block, for products
SPECIALISED bool HOLDS_ROW = false;  // a warp reads all logits of its token
SPECIALISED bool DENSE = false;      // rows of table, logits and results follow each other
SPECIALISED int GROUP = 0;           // experts whose rows a warp reads at once; 0: a warp multiplies whole rows
SPECIALISED int HIDDEN = 4096;       // if GROUP > 0
SPECIALISED bool ALIGNED = true;     // rows of x and gate start at 16-byte words, and hidden is a multiple of 8

typedef Integer<TOKEN_ID_BYTES>::type token_id_t;
typedef Integer<TABLE_BYTES, TABLE_UNSIGNED>::type expert_t;
typedef Scalar<DTYPE>::type scalar_t;
typedef Scalar<WEIGHT_DTYPE>::type gate_t;

// The parameters of the kernel. The numbers are read where they lie (__grid_constant__), which keeps registers free.
struct Call {
    const token_id_t* token_ids;
    const expert_t* table;
    const scalar_t* logits;
    const scalar_t* x;
    const gate_t* gate;
    const float* logit_bias;
    const float* expert_scale;
    const int* num_valid;
    weight_t* weights;
    index_t* indices;
    int num_valid_value;
    int64_t num_tokens;
    const MethodNumbers& numbers;
    int64_t vocab_size, hidden, table_stride, logits_stride, x_stride, weight_stride, weights_stride, indices_stride;
    Replicas replicas = {};  // of given experts
};

__device__ __forceinline__ bool exists(int64_t id, int64_t count) {
    return static_cast<unsigned long long>(id) < static_cast<unsigned long long>(count);
}

// Return the row of the table that a token of the call has.
__device__ __forceinline__ token_id_t table_row(const Call& call, int64_t token) {
    return BY_TOKEN_ID ? call.token_ids[token] : static_cast<token_id_t>(token);
}
