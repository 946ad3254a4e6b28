//! A kernel crate that compiles: one kernel, one bounds check.
#![no_std]
#![feature(abi_ptx)]

/// `y[0] = values[index]`, and no store when the index is out of bounds.
///
/// # Safety
/// `values` points to 4 elements, `y` to one.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn pick(values: *const f32, index: u32, y: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let values = &*values.cast::<[f32; 4]>();
        *y = values[index as usize];
    }
}
