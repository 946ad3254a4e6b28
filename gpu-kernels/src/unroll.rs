//! Loops whose index is a constant.

/// Repeats `$body` for each `$i` from 0 to `$n - 1`, `$n` at most 16, with `$i` a constant in each
/// copy. Register arrays stay in registers only where every index is known when the kernel is
/// compiled; an array that is indexed by a loop variable lands in local memory.
macro_rules! unroll {
    ($i:ident < 2 => $body:block) => { unroll!(@copies $i, $body, 0 1) };
    ($i:ident < 4 => $body:block) => { unroll!(@copies $i, $body, 0 1 2 3) };
    ($i:ident < 8 => $body:block) => { unroll!(@copies $i, $body, 0 1 2 3 4 5 6 7) };
    // A number that only the caller's generics tell.
    ($i:ident < $n:expr => $body:block) => {
        unroll!(@copies $i, { if $i < $n $body }, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    // On the host there are no registers to keep, and copies would only take time to compile.
    (@copies $i:ident, $body:block, $($k:literal)*) => {{
        #[cfg(target_arch = "nvptx64")]
        {$({
            const $i: usize = $k;
            $body
        })*}
        #[cfg(not(target_arch = "nvptx64"))]
        #[allow(non_snake_case)]
        for $i in [$($k as usize),*] $body
    }};
}

pub(crate) use unroll;
