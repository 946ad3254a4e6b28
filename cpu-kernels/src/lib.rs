//! The operations of a forward pass on the CPU, one a file.
//!
//! Every operation has a `reference`: plain loops that accumulate in f64 wherever they sum, the
//! truth that each fast variant, on a CPU or a GPU, is tested against. Letters in shapes: `t` tokens,
//! `n` rows, `k` columns, `d` model width, `h` query heads, `kv` key/value heads, `dh` head width,
//! `s` context capacity.

pub mod add;
pub mod attention;
pub mod buffer;
pub mod embed;
pub mod isa;
pub mod kv_append;
pub mod kv_values;
mod lanes;
pub mod levels;
pub mod linear;
pub mod logits;
pub mod pages;
pub mod read;
pub mod relu2_glu;
pub mod rescale;
pub mod rmsnorm;
pub mod rope;
pub mod rope_kv_append;
pub mod round_int8;
pub mod sample;
#[cfg(target_arch = "aarch64")]
mod sdot;
pub mod swiglu;
pub mod team;
#[cfg(test)]
mod testing;
pub mod tuned;
