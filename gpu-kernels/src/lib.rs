//! The GPU kernels of one forward pass, in Rust. One source, two builds: PTX for the device, host
//! code under the emulator of `cuda_std`.
//!
//! One file an operation, named as its reference in `cpu-kernels`. Each file holds the kernel, the
//! `plan` that checks a call of it on the host, and its index helpers. Kernels touch memory only
//! through `ptx`, whose function names say space, width and cache hint.
//!
//! Position and tokens live in device memory (`state`, `tokens`), so the launches of one decode
//! step are the same at every position and can be replayed from a graph.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, f16))]
// A kernel's parameters are its PTX signature: they cannot be gathered in a struct.
#![allow(clippy::too_many_arguments)]

pub mod add;
mod arrive;
pub mod attention;
pub mod embed;
pub mod kv_append;
pub mod kv_values;
pub mod linear;
pub mod logits;
mod product;
pub mod ptx;
pub mod read;
mod reduce;
pub mod relu2_glu;
pub mod rescale;
pub mod rmsnorm;
pub mod rope;
pub mod rope_kv_append;
pub mod round_int8;
pub mod sample;
pub mod swiglu;
mod unroll;

#[cfg(all(feature = "cases", not(target_arch = "nvptx64")))]
pub mod cases;
#[cfg(not(target_arch = "nvptx64"))]
pub mod launch;
#[cfg(not(target_arch = "nvptx64"))]
pub mod tuned;
#[cfg(not(target_arch = "nvptx64"))]
pub mod variant;

#[cfg(not(target_arch = "nvptx64"))]
pub use cuda_std::emulator;

/// Every kernel, for the emulator.
#[cfg(not(target_arch = "nvptx64"))]
pub static ENTRIES: &[&cuda_std::emulator::Entry] = &[
    &embed::EMBED_INT8_ENTRY,
    &embed::EMBED_F16_ENTRY,
    &rmsnorm::RMSNORM_F32_ENTRY,
    &rmsnorm::RMSNORM_F16_ENTRY,
    &linear::gemv_int4::LINEAR_GEMV_INT4_BASELINE_ENTRY,
    &linear::gemv_int4::LINEAR_GEMV_INT4_MULTIROW_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G32_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G64_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G128_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G32_MIN_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G64_MIN_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G128_MIN_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G32_HALF_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G64_HALF_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G128_HALF_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G32_MIN_HALF_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G64_MIN_HALF_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G128_MIN_HALF_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G32_HEADS_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G64_HEADS_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G128_HEADS_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G32_MIN_HEADS_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G64_MIN_HEADS_ENTRY,
    &linear::gemv_int4_mma::LINEAR_GEMV_INT4_MMA_G128_MIN_HEADS_ENTRY,
    &linear::gemm_int4::LINEAR_GEMM_INT4_T8_ENTRY,
    &linear::gemm_int4::LINEAR_GEMM_INT4_T16_ENTRY,
    &linear::gemm_int4::LINEAR_GEMM_INT4_T32_ENTRY,
    &linear::gemm_int4::LINEAR_GEMM_INT4_T64_ENTRY,
    &linear::gemm_int4::LINEAR_GEMM_INT4_R128_T128_ENTRY,
    &linear::gemm_int4::LINEAR_GEMM_INT4_R128_T128_MIN_ENTRY,
    &linear::gemm_int4::LINEAR_GEMM_INT4_R256_T128_ENTRY,
    &linear::gemm_int4::LINEAR_GEMM_INT4_R256_T128_MIN_ENTRY,
    &linear::gemv_int8::LINEAR_GEMV_INT8_MULTIROW_ENTRY,
    &linear::gemv_f16::LINEAR_GEMV_F16_ENTRY,
    &rope::ROPE_F32_ENTRY,
    &kv_append::KV_APPEND_F16_ENTRY,
    &kv_append::KV_APPEND_V8_ENTRY,
    &rope_kv_append::ROPE_KV_APPEND_F16_ENTRY,
    &rope_kv_append::ROPE_KV_APPEND_V8_ENTRY,
    &attention::block_a_head::ATTENTION_DECODE_F16_ENTRY,
    &rope_kv_append::tokens::ROPE_KV_APPEND_TOKENS_F16_ENTRY,
    &rope_kv_append::tokens::ROPE_KV_APPEND_TOKENS_V8_ENTRY,
    &kv_values::KV_VALUES_F16_ENTRY,
    &attention::prompt::ATTENTION_PROMPT_F16_D64_ENTRY,
    &attention::prompt::ATTENTION_PROMPT_F16_D96_ENTRY,
    &attention::prompt::ATTENTION_PROMPT_F16_D128_ENTRY,
    &attention::split::ATTENTION_SPLIT_F16_D64_ENTRY,
    &attention::split::ATTENTION_SPLIT_F16_D96_ENTRY,
    &attention::split::ATTENTION_SPLIT_F16_D128_ENTRY,
    &attention::split::ATTENTION_SPLIT_F16_D256_ENTRY,
    &attention::split::ATTENTION_SPLIT_V8_D64_ENTRY,
    &attention::split::ATTENTION_SPLIT_V8_D96_ENTRY,
    &attention::split::ATTENTION_SPLIT_V8_D128_ENTRY,
    &swiglu::SWIGLU_F32_ENTRY,
    &relu2_glu::RELU2_GLU_F32_ENTRY,
    &round_int8::ROUND_INT8_F32_ENTRY,
    &rescale::RESCALE_F32_ENTRY,
    &add::RESIDUAL_ADD_F32_ENTRY,
    &logits::LOGITS_INT8_ENTRY,
    &logits::LOGITS_INT8_BY_ROW_ENTRY,
    &logits::LOGITS_INT8_TOP_ENTRY,
    &logits::LOGITS_INT8_BY_ROW_TOP_ENTRY,
    &sample::ARGMAX_F32_ENTRY,
    &sample::ADVANCE_POSITION_ENTRY,
    &sample::draw::SAMPLE_TOPK_ENTRY,
    &read::READ_BYTES_ENTRY,
];
