//! `mma.sync`: the matrix product of a warp.

use half::f16;

/// Columns of A, rows of B.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// `m16n8k8`
    K8,
    /// `m16n8k16`
    K16,
}

/// A lane's registers: two halves in each of `a` and `b`. With [`Depth::K8`] the first two of `a`
/// and the first of `b` count.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fragments {
    pub a: [u32; 4],
    pub b: [u32; 2],
    pub c: [f32; 4],
}

/// The two halves of a register, the lower one first.
fn halves(register: u32) -> [f64; 2] {
    [register as u16, (register >> 16) as u16].map(|bits| f16::from_bits(bits).to_f64())
}

/// `A B + C`: each lane's part of the result. Sums are in double precision, rounded once.
pub fn products(depth: Depth, lanes: &[Fragments; 32]) -> [[f32; 4]; 32] {
    let mut a = [[0.0f64; 16]; 16];
    let mut b = [[0.0f64; 16]; 8];
    let registers = if depth == Depth::K8 { 1 } else { 2 };
    for (lane, fragments) in lanes.iter().enumerate() {
        let (g, q) = (lane / 4, lane % 4);
        for i in 0..registers {
            let k = 2 * q + 8 * i;
            a[g][k..k + 2].copy_from_slice(&halves(fragments.a[2 * i]));
            a[g + 8][k..k + 2].copy_from_slice(&halves(fragments.a[2 * i + 1]));
            b[g][k..k + 2].copy_from_slice(&halves(fragments.b[i]));
        }
    }
    let mut results = [[0.0; 4]; 32];
    for (lane, fragments) in lanes.iter().enumerate() {
        for (i, &c) in fragments.c.iter().enumerate() {
            let (row, column) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
            let products = a[row].iter().zip(&b[column]).map(|(x, y)| x * y);
            results[lane][i] = (products.sum::<f64>() + f64::from(c)) as f32;
        }
    }
    results
}
