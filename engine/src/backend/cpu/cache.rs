//! Keys and values of all layers. Memory that no position has reached yet is address space that the
//! system fills as it is first written: a large cache takes as much as is used of it.

use cpu_kernels::attention::Values;
use cpu_kernels::kv_append;
use cpu_kernels::team::SharedSlice;
use half::f16;
use half::slice::HalfBitsSliceExt;
use models::arch::Config;

use super::super::{KvCache, KvForm};

/// The memory, numbers of f16 as their bits.
pub(super) struct Cache {
    /// `(layers, kv, s, dh)`.
    keys: Vec<u16>,
    values: Stored,
    head_dim: usize,
    /// Rows of a layer: kv heads times positions.
    layer_rows: usize,
}

enum Stored {
    /// `(layers, kv, s, dh)`.
    F16(Vec<u16>),
    /// The same and `(layers, kv, s)` scales.
    Int8(Vec<i8>, Vec<u16>),
}

/// The cache as the threads of a team share it.
#[derive(Clone, Copy)]
pub(super) struct SharedCache<'a> {
    keys: SharedSlice<'a, f16>,
    values: SharedValues<'a>,
    head_dim: usize,
    layer_rows: usize,
}

#[derive(Clone, Copy)]
enum SharedValues<'a> {
    F16(SharedSlice<'a, f16>),
    Int8(SharedSlice<'a, i8>, SharedSlice<'a, f16>),
}

impl Cache {
    /// An empty cache; `None` if there is not that much memory.
    pub fn new(config: &Config, cache: KvCache) -> Option<Cache> {
        let layer_rows = config.kv_heads.checked_mul(cache.tokens)?;
        let rows = layer_rows.checked_mul(config.layers)?;
        let elems = rows.checked_mul(config.head_dim)?;
        Some(Cache {
            keys: zeroed(elems)?,
            values: match cache.form {
                KvForm::K16V16 => Stored::F16(zeroed(elems)?),
                KvForm::K16V8 => Stored::Int8(zeroed(elems)?, zeroed(rows)?),
            },
            head_dim: config.head_dim,
            layer_rows,
        })
    }

    pub fn share(&mut self) -> SharedCache<'_> {
        fn halves(bits: &mut [u16]) -> SharedSlice<'_, f16> {
            SharedSlice::new(bits.reinterpret_cast_mut::<f16>())
        }
        SharedCache {
            keys: halves(&mut self.keys),
            values: match &mut self.values {
                Stored::F16(values) => SharedValues::F16(halves(values)),
                Stored::Int8(levels, scales) => {
                    SharedValues::Int8(SharedSlice::new(levels), halves(scales))
                }
            },
            head_dim: self.head_dim,
            layer_rows: self.layer_rows,
        }
    }
}

impl<'a> SharedCache<'a> {
    /// Appends the key and the value, `(dh,)` each, of row `row` of a layer.
    ///
    /// # Safety
    /// Nobody else reads or writes the row.
    pub unsafe fn append(&self, layer: usize, row: usize, [key, value]: [&[f32]; 2]) {
        let row = layer * self.layer_rows + row;
        let elems = row * self.head_dim..(row + 1) * self.head_dim;
        // SAFETY: the row is the caller's alone.
        unsafe {
            kv_append::part(key, self.keys.slice_mut(elems.clone()));
            match self.values {
                SharedValues::F16(values) => kv_append::part(value, values.slice_mut(elems)),
                SharedValues::Int8(levels, scales) => {
                    let scale = kv_append::part_int8(value, levels.slice_mut(elems));
                    scales.slice_mut(row..row + 1)[0] = scale;
                }
            }
        }
    }

    /// Keys and values of a layer.
    ///
    /// # Safety
    /// Nobody writes them while the result lives.
    pub unsafe fn layer(&self, layer: usize) -> (&'a [f16], Values<'a>) {
        let rows = layer * self.layer_rows..(layer + 1) * self.layer_rows;
        let elems = rows.start * self.head_dim..rows.end * self.head_dim;
        // SAFETY: by the caller's promise.
        unsafe {
            let keys = self.keys.slice(elems.clone());
            let values = match self.values {
                SharedValues::F16(values) => Values::F16(values.slice(elems)),
                SharedValues::Int8(levels, scales) => {
                    Values::Int8(levels.slice(elems), scales.slice(rows))
                }
            };
            (keys, values)
        }
    }
}

/// `elems` zeros that the system hands out as they are first touched; `None` if it has not that
/// much memory to give.
fn zeroed<T: Default + Clone>(elems: usize) -> Option<Vec<T>> {
    // The vector below would end the process where this one only fails.
    Vec::<T>::new().try_reserve_exact(elems).ok()?;
    Some(vec![T::default(); elems])
}
