//! One function an instruction: the only file of this crate with `asm!`, and the only way in which
//! kernels touch memory.
//!
//! The name says space, width and cache hint. On the device each function is the instruction that
//! its documentation names; on the host it is a twin with the documented semantics, and every
//! memory access goes through the emulator, which reports the kernel line that made it
//! (`#[track_caller]`) if it is out of bounds, misaligned, or reads what nothing wrote.
//!
//! | prefix | instruction | for |
//! |---|---|---|
//! | `ld_global_*` | `ld.global` | data that this launch may have written |
//! | `ld_global_nc_*` | `ld.global.nc` | data that is constant during the launch: inputs |
//! | `ld_global_nc_v4_*` | `ld.global.nc.L1::no_allocate` | weights: read once, kept out of L1 |
//! | `ld_global_*_if` | `@p ld.global` | loads that may not be there, without a branch |
//! | `st_global_*`, `ld_shared_*`, `st_shared_*` | `st.global`, `ld.shared`, `st.shared` | |
//!
//! Addresses have to be multiples of the access width: 16 bytes for `v4` of 32-bit values.
//! Loads are `pure, readonly` to the compiler: it may merge two of the same address, but not move
//! them across a store or a barrier.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::emulator::access;
use cuda_std::shared::Shared;

// The symbol behind `cuda_std::shared::dynamic_shared_mem`; its size is given at launch.
#[cfg(target_arch = "nvptx64")]
core::arch::global_asm!(".extern .shared .align 1024 .b8 dyn_smem[];");

/// Loads of one value from global memory.
macro_rules! load_global {
    ($($(#[$doc:meta])* $name:ident: $ty:ty = $instruction:literal, $class:ident, $register:ty, $twin:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// `p` is aligned, in bounds, initialised global memory; for `nc`, constant during the
        /// launch.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name(p: *const $ty) -> $ty {
            #[cfg(target_arch = "nvptx64")]
            {
                let value: $register;
                // SAFETY: the caller vouches for `p`.
                unsafe {
                    asm!(concat!($instruction, " {}, [{}];"), out($class) value, in(reg64) p,
                        options(pure, readonly, nostack));
                }
                value as $ty
            }
            #[cfg(not(target_arch = "nvptx64"))]
            access::$twin(p)
        }
    )*};
}

load_global! {
    /// `ld.global.u8`
    ld_global_u8: u8 = "ld.global.u8", reg32, u32, load_global;
    /// `ld.global.s8`
    ld_global_i8: i8 = "ld.global.s8", reg32, i32, load_global;
    /// `ld.global.u16`: also a half, see [`f16_to_f32`].
    ld_global_u16: u16 = "ld.global.u16", reg16, u16, load_global;
    /// `ld.global.u32`
    ld_global_u32: u32 = "ld.global.u32", reg32, u32, load_global;
    /// `ld.global.f32`
    ld_global_f32: f32 = "ld.global.f32", reg32, f32, load_global;
    /// `ld.global.nc.u8`
    ld_global_nc_u8: u8 = "ld.global.nc.u8", reg32, u32, load_global_nc;
    /// `ld.global.nc.s8`
    ld_global_nc_i8: i8 = "ld.global.nc.s8", reg32, i32, load_global_nc;
    /// `ld.global.nc.u16`: also a half, see [`f16_to_f32`].
    ld_global_nc_u16: u16 = "ld.global.nc.u16", reg16, u16, load_global_nc;
    /// `ld.global.nc.u32`
    ld_global_nc_u32: u32 = "ld.global.nc.u32", reg32, u32, load_global_nc;
    /// `ld.global.nc.f32`
    ld_global_nc_f32: f32 = "ld.global.nc.f32", reg32, f32, load_global_nc;
}

/// Loads of two values next to each other from global memory.
macro_rules! load_global_v2 {
    ($($(#[$doc:meta])* $name:ident: $ty:ty = $instruction:literal, $twin:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// `p` is a multiple of 8 bytes.
        ///
        /// # Safety
        /// The 8 bytes at `p` are aligned, in bounds, initialised global memory; for `nc`, constant
        /// during the launch.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name(p: *const $ty) -> [$ty; 2] {
            #[cfg(target_arch = "nvptx64")]
            {
                let (a, b);
                // SAFETY: the caller vouches for `p`.
                unsafe {
                    asm!(concat!($instruction, " {{{}, {}}}, [{}];"),
                        out(reg32) a, out(reg32) b, in(reg64) p,
                        options(pure, readonly, nostack));
                }
                [a, b]
            }
            #[cfg(not(target_arch = "nvptx64"))]
            access::$twin(p.cast::<[$ty; 2]>())
        }
    )*};
}

/// Loads of four values next to each other from global memory.
macro_rules! load_global_v4 {
    ($($(#[$doc:meta])* $name:ident: $ty:ty = $instruction:literal, $twin:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// `p` is a multiple of 16 bytes.
        ///
        /// # Safety
        /// The 16 bytes at `p` are aligned, in bounds, initialised global memory; for `nc`,
        /// constant during the launch.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name(p: *const $ty) -> [$ty; 4] {
            #[cfg(target_arch = "nvptx64")]
            {
                let (a, b, c, d);
                // SAFETY: the caller vouches for `p`.
                unsafe {
                    asm!(concat!($instruction, " {{{}, {}, {}, {}}}, [{}];"),
                        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) p,
                        options(pure, readonly, nostack));
                }
                [a, b, c, d]
            }
            #[cfg(not(target_arch = "nvptx64"))]
            access::$twin(p.cast::<[$ty; 4]>())
        }
    )*};
}

load_global_v2! {
    /// `ld.global.L1::no_allocate.v2.u32`: data that the launch before may have written, read once.
    ld_global_once_v2_u32: u32 = "ld.global.L1::no_allocate.v2.u32", load_global;
    /// `ld.global.nc.v2.u32`
    ld_global_nc_v2_u32: u32 = "ld.global.nc.v2.u32", load_global_nc;
}

load_global_v4! {
    /// `ld.global.v4.u32`
    ld_global_v4_u32: u32 = "ld.global.v4.u32", load_global;
    /// `ld.global.v4.f32`
    ld_global_v4_f32: f32 = "ld.global.v4.f32", load_global;
    /// `ld.global.L1::no_allocate.v4.u32`: data that the launch before may have written, read once.
    ld_global_once_v4_u32: u32 = "ld.global.L1::no_allocate.v4.u32", load_global;
    /// `ld.global.nc.L1::no_allocate.v4.u32`
    ld_global_nc_v4_u32: u32 = "ld.global.nc.L1::no_allocate.v4.u32", load_global_nc;
    /// `ld.global.nc.L1::no_allocate.v4.f32`
    ld_global_nc_v4_f32: f32 = "ld.global.nc.L1::no_allocate.v4.f32", load_global_nc;
}

/// Loads that are made only where `condition` holds, without a branch: elsewhere the result is
/// `otherwise`, and nothing is accessed.
macro_rules! load_global_if {
    ($($(#[$doc:meta])* $name:ident: $ty:ty = $instruction:literal, $twin:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// As the load without a condition, if `condition` holds.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name(condition: bool, p: *const $ty, otherwise: $ty) -> $ty {
            #[cfg(target_arch = "nvptx64")]
            {
                let mut value = otherwise;
                // SAFETY: the caller vouches for `p`.
                unsafe {
                    asm!("{{ .reg .pred there; setp.ne.u32 there, {}, 0;",
                        concat!("@there ", $instruction, " {}, [{}]; }}"),
                        in(reg32) u32::from(condition), inout(reg32) value, in(reg64) p,
                        options(pure, readonly, nostack));
                }
                value
            }
            #[cfg(not(target_arch = "nvptx64"))]
            if condition { access::$twin(p) } else { otherwise }
        }
    )*};
}

load_global_if! {
    /// `@p ld.global.f32`
    ld_global_f32_if: f32 = "ld.global.f32", load_global;
    /// `@p ld.global.nc.u32`
    ld_global_nc_u32_if: u32 = "ld.global.nc.u32", load_global_nc;
}

/// As [`ld_global_nc_u32_if`], of two values: `@p ld.global.nc.v2.u32`.
///
/// # Safety
/// As [`ld_global_nc_v2_u32`], if `condition` holds.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn ld_global_nc_v2_u32_if(
    condition: bool,
    p: *const u32,
    otherwise: [u32; 2],
) -> [u32; 2] {
    #[cfg(target_arch = "nvptx64")]
    {
        let [mut a, mut b] = otherwise;
        // SAFETY: the caller vouches for `p`.
        unsafe {
            asm!("{{ .reg .pred there; setp.ne.u32 there, {}, 0;",
                "@there ld.global.nc.v2.u32 {{{}, {}}}, [{}]; }}",
                in(reg32) u32::from(condition), inout(reg32) a, inout(reg32) b, in(reg64) p,
                options(pure, readonly, nostack));
        }
        [a, b]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    if condition {
        access::load_global_nc(p.cast())
    } else {
        otherwise
    }
}

/// As [`load_global_if`], of four values next to each other.
macro_rules! load_global_v4_if {
    ($($(#[$doc:meta])* $name:ident: $ty:ty = $instruction:literal, $twin:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// As the load without a condition, if `condition` holds.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name(condition: bool, p: *const $ty, otherwise: [$ty; 4]) -> [$ty; 4] {
            #[cfg(target_arch = "nvptx64")]
            {
                let [mut a, mut b, mut c, mut d] = otherwise;
                // SAFETY: the caller vouches for `p`.
                unsafe {
                    asm!("{{ .reg .pred there; setp.ne.u32 there, {}, 0;",
                        concat!("@there ", $instruction, " {{{}, {}, {}, {}}}, [{}]; }}"),
                        in(reg32) u32::from(condition), inout(reg32) a, inout(reg32) b,
                        inout(reg32) c, inout(reg32) d, in(reg64) p,
                        options(pure, readonly, nostack));
                }
                [a, b, c, d]
            }
            #[cfg(not(target_arch = "nvptx64"))]
            if condition { access::$twin(p.cast()) } else { otherwise }
        }
    )*};
}

load_global_v4_if! {
    /// `@p ld.global.v4.u32`
    ld_global_v4_u32_if: u32 = "ld.global.v4.u32", load_global;
    /// `@p ld.global.v4.f32`
    ld_global_v4_f32_if: f32 = "ld.global.v4.f32", load_global;
    /// `@p ld.global.nc.L1::no_allocate.v4.u32`
    ld_global_nc_v4_u32_if: u32 = "ld.global.nc.L1::no_allocate.v4.u32", load_global_nc;
}

pub use copies::*;

/// Stores of one value to global memory.
macro_rules! store_global {
    ($($(#[$doc:meta])* $name:ident: $ty:ty = $instruction:literal, $class:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// `p` is aligned, in bounds global memory.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name(p: *mut $ty, value: $ty) {
            // SAFETY: the caller vouches for `p`; the block is a memory clobber.
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                asm!(concat!($instruction, " [{}], {};"), in(reg64) p, in($class) value,
                    options(nostack));
            }
            #[cfg(not(target_arch = "nvptx64"))]
            access::store_global(p, value);
        }
    )*};
}

store_global! {
    /// `st.global.u16`
    st_global_u16: u16 = "st.global.u16", reg16;
    /// `st.global.u32`
    st_global_u32: u32 = "st.global.u32", reg32;
    /// `st.global.f32`
    st_global_f32: f32 = "st.global.f32", reg32;
}

/// `st.global.v4.f32`: four values next to each other. `p` is a multiple of 16 bytes.
///
/// # Safety
/// The 16 bytes at `p` are aligned, in bounds global memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn st_global_v4_f32(p: *mut f32, value: [f32; 4]) {
    // SAFETY: the caller vouches for `p`; the block is a memory clobber.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("st.global.v4.f32 [{}], {{{}, {}, {}, {}}};", in(reg64) p,
            in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3],
            options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::store_global(p.cast::<[f32; 4]>(), value);
}

/// `st.global.v2.u32`: two values next to each other. `p` is a multiple of 8 bytes.
///
/// # Safety
/// The 8 bytes at `p` are aligned, in bounds global memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn st_global_v2_u32(p: *mut u32, value: [u32; 2]) {
    // SAFETY: the caller vouches for `p`; the block is a memory clobber.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("st.global.v2.u32 [{}], {{{}, {}}};", in(reg64) p,
            in(reg32) value[0], in(reg32) value[1], options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::store_global(p.cast::<[u32; 2]>(), value);
}

/// Loads and stores of one value in shared memory.
macro_rules! shared {
    ($($ty:ty: $load:ident = $ld:literal, $store:ident = $st:literal;)*) => {$(
        #[doc = concat!("`", $ld, "`: the value at `base` + `offset_bytes`.")]
        ///
        /// # Safety
        /// The address is aligned, inside the block's shared memory, and written before; what
        /// another thread wrote is separated by a barrier.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $load(base: Shared, offset_bytes: u32) -> $ty {
            let address = base.offset_bytes(offset_bytes).address();
            #[cfg(target_arch = "nvptx64")]
            {
                let value: $ty;
                // SAFETY: the caller vouches for the address.
                unsafe {
                    asm!(concat!($ld, " {}, [{}];"), out(reg32) value, in(reg32) address,
                        options(pure, readonly, nostack));
                }
                value
            }
            #[cfg(not(target_arch = "nvptx64"))]
            access::load_shared(address)
        }

        #[doc = concat!("`", $st, "`: stores at `base` + `offset_bytes`.")]
        ///
        /// # Safety
        /// The address is aligned and inside the block's shared memory; other threads' accesses to
        /// it are separated by a barrier.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $store(base: Shared, offset_bytes: u32, value: $ty) {
            let address = base.offset_bytes(offset_bytes).address();
            // SAFETY: the caller vouches for the address; the block is a memory clobber.
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                asm!(concat!($st, " [{}], {};"), in(reg32) address, in(reg32) value,
                    options(nostack));
            }
            #[cfg(not(target_arch = "nvptx64"))]
            access::store_shared(address, value);
        }
    )*};
}

shared! {
    u32: ld_shared_u32 = "ld.shared.u32", st_shared_u32 = "st.shared.u32";
    f32: ld_shared_f32 = "ld.shared.f32", st_shared_f32 = "st.shared.f32";
}

/// `ld.shared.v4.f32`: four values at `base` + `offset_bytes`, a multiple of 16.
///
/// # Safety
/// As [`ld_shared_f32`], for 16 bytes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn ld_shared_v4_f32(base: Shared, offset_bytes: u32) -> [f32; 4] {
    let address = base.offset_bytes(offset_bytes).address();
    #[cfg(target_arch = "nvptx64")]
    {
        let (a, b, c, d);
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.shared.v4.f32 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
                options(pure, readonly, nostack));
        }
        [a, b, c, d]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::load_shared(address)
}

/// `st.shared.v4.f32`: four values at `base` + `offset_bytes`, a multiple of 16.
///
/// # Safety
/// As [`st_shared_f32`], for 16 bytes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn st_shared_v4_f32(base: Shared, offset_bytes: u32, value: [f32; 4]) {
    let address = base.offset_bytes(offset_bytes).address();
    // SAFETY: the caller vouches for the address; the block is a memory clobber.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("st.shared.v4.f32 [{}], {{{}, {}, {}, {}}};", in(reg32) address,
            in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3],
            options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::store_shared(address, value);
}

/// `ld.shared.v4.u32`: four values at `base` + `offset_bytes`, a multiple of 16.
///
/// # Safety
/// As [`ld_shared_u32`], for 16 bytes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn ld_shared_v4_u32(base: Shared, offset_bytes: u32) -> [u32; 4] {
    let address = base.offset_bytes(offset_bytes).address();
    #[cfg(target_arch = "nvptx64")]
    {
        let (a, b, c, d);
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.shared.v4.u32 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
                options(pure, readonly, nostack));
        }
        [a, b, c, d]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::load_shared(address)
}

/// `ld.shared.v2.u32`: two values at `base` + `offset_bytes`, a multiple of 8.
///
/// # Safety
/// As [`ld_shared_u32`], for 8 bytes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn ld_shared_v2_u32(base: Shared, offset_bytes: u32) -> [u32; 2] {
    let address = base.offset_bytes(offset_bytes).address();
    #[cfg(target_arch = "nvptx64")]
    {
        let (a, b);
        // SAFETY: the caller vouches for the address.
        unsafe {
            asm!("ld.shared.v2.u32 {{{}, {}}}, [{}];", out(reg32) a, out(reg32) b,
                in(reg32) address, options(pure, readonly, nostack));
        }
        [a, b]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::load_shared(address)
}

/// `st.shared.v2.u32`: two values at `base` + `offset_bytes`, a multiple of 8.
///
/// # Safety
/// As [`st_shared_u32`], for 8 bytes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn st_shared_v2_u32(base: Shared, offset_bytes: u32, value: [u32; 2]) {
    let address = base.offset_bytes(offset_bytes).address();
    // SAFETY: the caller vouches for the address; the block is a memory clobber.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("st.shared.v2.u32 [{}], {{{}, {}}};", in(reg32) address,
            in(reg32) value[0], in(reg32) value[1], options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::store_shared(address, value);
}

/// `griddepcontrol.wait`: waits until the launches before this one have ended and what they wrote
/// can be seen. What a kernel does above it, it may do while they still run: only what no launch
/// writes may be touched there. Nothing below sm_90, where a launch starts when the one before has
/// ended, nor on the host, where launches run one after the other.
///
/// A plan whose kernel calls it, in every thread that touches what other launches write, says so
/// with [`CallBuilder::waits`](crate::launch::CallBuilder::waits).
#[inline(always)]
pub fn griddep_wait() {
    // SAFETY: orders memory, touches none; a memory clobber, so no access moves across it.
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    unsafe {
        asm!("griddepcontrol.wait;", options(nostack));
    }
}

/// `nanosleep`: the thread does nothing for about that long; between two looks at memory that others
/// need too. Nothing on the host.
#[inline(always)]
pub fn nanosleep(_ns: u32) {
    // SAFETY: touches no memory; with a clobber, so that it stays where it is put.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("nanosleep.u32 {};", in(reg32) _ns, options(nostack));
    }
}

/// `griddepcontrol.launch_dependents`: the next launch may start once every block of this one has
/// called it or ended. It only moves the start: the next launch sees this one's results after its
/// own [`griddep_wait`]. Nothing below sm_90 and on the host.
#[inline(always)]
pub fn griddep_launch() {
    // SAFETY: touches no memory; with a clobber, so that it stays where it is put.
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90"))]
    unsafe {
        asm!("griddepcontrol.launch_dependents;", options(nostack));
    }
}

/// `st.shared.v4.u32`: four values at `base` + `offset_bytes`, a multiple of 16.
///
/// # Safety
/// As [`st_shared_u32`], for 16 bytes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn st_shared_v4_u32(base: Shared, offset_bytes: u32, value: [u32; 4]) {
    let address = base.offset_bytes(offset_bytes).address();
    // SAFETY: the caller vouches for the address; the block is a memory clobber.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("st.shared.v4.u32 [{}], {{{}, {}, {}, {}}};", in(reg32) address,
            in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3],
            options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::store_shared(address, value);
}

/// Instructions on registers: `asm!` on the device, an expression on the host.
macro_rules! arithmetic {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $ty:ty, $class:ident);*) -> $result:ty, $out:ident = $instruction:literal, $twin:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name($($argument: $ty),*) -> $result {
            #[cfg(target_arch = "nvptx64")]
            {
                let value: $result;
                // SAFETY: registers only.
                unsafe {
                    asm!($instruction, out($out) value, $(in($class) $argument),*,
                        options(pure, nomem, nostack));
                }
                value
            }
            #[cfg(not(target_arch = "nvptx64"))]
            $twin
        }
    )*};
}

arithmetic! {
    /// `cvt.f32.f16`: a half, given as its bits, to single precision. Exact; subnormals are kept.
    f16_to_f32(bits: u16, reg16) -> f32, reg32 = "cvt.f32.f16 {}, {};", twin::f16_to_f32(bits);

    /// `cvt.rn.f16.f32`: to the nearest half, ties to even, as bits. Past the largest half (65504
    /// plus half a unit) infinity; subnormal halves are kept; NaN becomes 0x7fff.
    f32_to_f16(value: f32, reg32) -> u16, reg16 = "cvt.rn.f16.f32 {}, {};", twin::f32_to_f16(value);

    /// `fma.rn.f32`: `a * b + c` rounded once. Subnormals are kept. Same bits on the host.
    fma(a: f32, reg32; b: f32, reg32; c: f32, reg32) -> f32, reg32
        = "fma.rn.f32 {}, {}, {}, {};", a.mul_add(b, c);

    /// `ex2.approx.ftz.f32`: 2^x. Subnormal inputs count as zero, subnormal results become zero.
    /// The device's relative error is at most 2^-22; the host twin is correctly rounded.
    exp2(x: f32, reg32) -> f32, reg32 = "ex2.approx.ftz.f32 {}, {};", twin::exp2(x);

    /// `rsqrt.approx.f32`: 1 / sqrt(x). +0 gives +inf, -0 gives -inf, +inf gives 0, a negative
    /// number NaN. The device's relative error is at most 2^-22.9; the host twin is correctly
    /// rounded.
    rsqrt(x: f32, reg32) -> f32, reg32 = "rsqrt.approx.f32 {}, {};", twin::rsqrt(x);

    /// `sqrt.rn.f32`: correctly rounded. Same bits on the host.
    sqrt(x: f32, reg32) -> f32, reg32 = "sqrt.rn.f32 {}, {};", x.sqrt();

    /// `rcp.approx.f32`: 1 / x. A zero gives an infinity of its sign, an infinity a zero of its
    /// sign. The device is at most one unit in the last place off; the host twin is correctly
    /// rounded.
    rcp(x: f32, reg32) -> f32, reg32 = "rcp.approx.f32 {}, {};", 1.0 / x;

    /// `dp4a.s32.s32`: the four signed bytes of `a` times those of `b`, summed onto `c`, wrapping.
    dp4a(a: u32, reg32; b: u32, reg32; c: i32, reg32) -> i32, reg32
        = "dp4a.s32.s32 {}, {}, {}, {};", twin::dp4a(a, b, c);

    /// `prmt.b32`: four of the eight bytes of `a` (0 to 3) and `b` (4 to 7), those that the low four
    /// nibbles of `selector` name, the lowest first. Nibbles are below 8: no sign is spread.
    permute_bytes(a: u32, reg32; b: u32, reg32; selector: u32, reg32) -> u32, reg32
        = "prmt.b32 {}, {}, {}, {};", twin::permute_bytes(a, b, selector);

    /// `add.rn.f16x2`: each half of `a` plus that of `b`, rounded to the nearest half.
    add_f16x2(a: u32, reg32; b: u32, reg32) -> u32, reg32
        = "add.rn.f16x2 {}, {}, {};", twin::sub_f16x2(a, b ^ 0x8000_8000);

    /// `sub.rn.f16x2`: each half of `a` minus that of `b`, rounded to the nearest half.
    sub_f16x2(a: u32, reg32; b: u32, reg32) -> u32, reg32
        = "sub.rn.f16x2 {}, {}, {};", twin::sub_f16x2(a, b);

    /// `fma.rn.f16x2`: `a * b + c` of each half, rounded once to the nearest half.
    fma_f16x2(a: u32, reg32; b: u32, reg32; c: u32, reg32) -> u32, reg32
        = "fma.rn.f16x2 {}, {}, {}, {};", twin::fma_f16x2(a, b, c);

    /// `dp4a.u32.s32`: the four unsigned bytes of `a` times the signed bytes of `b`, summed onto
    /// `c`, wrapping.
    dp4a_u8_i8(a: u32, reg32; b: u32, reg32; c: i32, reg32) -> i32, reg32
        = "dp4a.u32.s32 {}, {}, {}, {};", twin::dp4a_u8_i8(a, b, c);
}

/// `cvt.rn.f16x2.f32`: two floats as halves in one register, each as by [`f32_to_f16`]. On sm_75,
/// which lacks it, two conversions.
#[inline(always)]
pub fn f32x2_to_f16x2(low: f32, high: f32) -> u32 {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_80"))]
    {
        let halves: u32;
        // SAFETY: registers only.
        unsafe {
            asm!("cvt.rn.f16x2.f32 {}, {}, {};", out(reg32) halves, in(reg32) high, in(reg32) low,
                options(pure, nomem, nostack));
        }
        halves
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_80")))]
    {
        u32::from(f32_to_f16(low)) | u32::from(f32_to_f16(high)) << 16
    }
}

/// e^x as 2^(x log2 e): a multiplication and [`exp2`].
///
/// The rounding of the product adds a relative error of up to |x| 2^-24 ln 2 to that of [`exp2`].
/// Below about -87.3 the result is zero, above about 88.7 infinity.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    exp2(x * core::f32::consts::LOG2_E)
}

mod copies {
    mod ptx;

    pub use ptx::*;
}
#[cfg(test)]
mod tests;
#[cfg(not(target_arch = "nvptx64"))]
mod twin;
