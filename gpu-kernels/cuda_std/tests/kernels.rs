//! Correct kernels: the emulator runs them, in order and in random orders, and computes what a GPU
//! computes.

use cuda_std::emulator::access::{
    load_global, load_global_nc, load_shared, store_global, store_shared,
};
use cuda_std::emulator::{
    Buffer, KernelParam, Launch, count_conflicts, launch, launch_entry, take_conflicts,
};
use cuda_std::shared::dynamic_shared_mem;
use cuda_std::{atomic, grid, kernel, thread, warp};
use std::time::Instant;

/// In order, and in 20 random orders.
fn orders(launch: Launch) -> impl Iterator<Item = Launch> {
    std::iter::once(launch).chain((0..20).map(move |seed| launch.with_seed(seed)))
}

#[kernel]
unsafe fn indices(y: *mut [u32; 4]) {
    let block = thread::block_idx_x()
        + thread::grid_dim_x()
            * (thread::block_idx_y() + thread::grid_dim_y() * thread::block_idx_z());
    let threads = thread::block_dim_x() * thread::block_dim_y() * thread::block_dim_z();
    let i = block * threads + thread::thread_rank();
    let place = thread::thread_idx_x()
        | thread::thread_idx_y() << 8
        | thread::thread_idx_z() << 16
        | thread::block_idx_z() << 24;
    store_global(
        y.wrapping_add(i as usize),
        [i, place, warp::warp_id(), warp::lane_id()],
    );
}

#[test]
fn indices_run_x_fastest() {
    let y = Buffer::<[u32; 4]>::uninit(6 * 70);
    for launch in orders(Launch::new([1, 2, 3], [7, 5, 2])) {
        let report = launch_entry(&INDICES_ENTRY, &launch, &[y.address()]).unwrap();
        assert_eq!(
            (report.threads, report.global_bytes_stored),
            (420, 420 * 16)
        );
        for (i, [index, place, warp, lane]) in y.to_vec().unwrap().into_iter().enumerate() {
            let rank = i % 70;
            assert_eq!(index as usize, i);
            let expected =
                (rank % 7) | ((rank / 7 % 5) << 8) | ((rank / 35) << 16) | ((i / 140) << 24);
            assert_eq!(place as usize, expected);
            assert_eq!((warp as usize, lane as usize), (rank / 32, rank % 32));
        }
    }
}

/// y[row] = sum of x[row, :], a block a row: warp reductions, then one over the warps.
#[kernel]
unsafe fn row_sum(x: *const f32, y: *mut f32, k: u32) {
    let (shared, rank) = (dynamic_shared_mem(), thread::thread_idx_x());
    let (row, warps) = (thread::block_idx_x(), thread::block_dim_x() / warp::SIZE);
    let mut sum = 0.0f32;
    let mut i = rank;
    while i < k {
        sum += load_global_nc(x.wrapping_add((row * k + i) as usize));
        i += thread::block_dim_x();
    }
    let sum = warp::reduce_sum_f32(sum);
    if warp::lane_id() == 0 {
        store_shared(shared.offset_bytes(warp::warp_id() * 4).address(), sum);
    }
    thread::sync_threads();
    if warp::warp_id() == 0 {
        let lane = warp::lane_id();
        let part = if lane < warps {
            load_shared(shared.offset_bytes(lane * 4).address())
        } else {
            0.0f32
        };
        let total = warp::reduce_sum_f32(part);
        if lane == 0 {
            store_global(y.wrapping_add(row as usize), total);
        }
    }
}

#[test]
fn block_reduction_gives_the_same_bits_in_every_order() {
    let k = 777;
    let values: Vec<f32> = (0..5 * k)
        .map(|i| (i * 37 % 101) as f32 * 0.13 - 5.0)
        .collect();
    let (x, y) = (Buffer::from_slice(&values), Buffer::<f32>::uninit(5));
    let args = [x.address(), y.address(), (k as u32).to_slot()];
    let mut first = None;
    for launch in orders(Launch::linear(5, 256).with_shared_bytes(32)) {
        let report = launch_entry(&ROW_SUM_ENTRY, &launch, &args).unwrap();
        assert_eq!(report.barriers, 5);
        assert_eq!(report.warp_operations, 5 * (8 + 1) * 5);
        let sums = y.to_vec().unwrap();
        for (row, sum) in sums.iter().enumerate() {
            let exact: f64 = values[row * k..][..k].iter().map(|&v| f64::from(v)).sum();
            assert!(
                (f64::from(*sum) - exact).abs() < 1e-3,
                "row {row}: {sum} against {exact}"
            );
        }
        assert_eq!(*first.get_or_insert_with(|| sums.clone()), sums);
    }
}

#[kernel]
unsafe fn votes(y: *mut u32) {
    let rank = thread::thread_idx_x();
    // A partial warp votes with the lanes it has.
    let odd = warp::ballot(warp::FULL_MASK, rank % 2 == 1);
    let max = if warp::warp_id() == 0 {
        warp::reduce_max_f32(rank as f32 - 40.0)
    } else {
        -9.0
    };
    let flags = u32::from(warp::any(warp::FULL_MASK, rank == 40))
        | u32::from(warp::all(warp::FULL_MASK, rank < 32)) << 1
        | u32::from(max == -9.0) << 2;
    store_global(y.wrapping_add(rank as usize), odd & 0xffff_fff0 | flags);
}

#[test]
fn votes_of_whole_and_partial_warps() {
    let y = Buffer::<u32>::uninit(44);
    for launch in orders(Launch::linear(1, 44)) {
        launch_entry(&VOTES_ENTRY, &launch, &[y.address()]).unwrap();
        let votes = y.to_vec().unwrap();
        assert_eq!(votes[..32], [0xaaaa_aaa6; 32]);
        assert_eq!(votes[32..], [0x0000_0aa5; 12]);
    }
}

/// Four steps over the whole grid: each element becomes the sum of its neighbours in a ring.
#[kernel]
unsafe fn diffuse(a: *mut f32, b: *mut f32, n: u32, counter: *mut u32) {
    let i = thread::index_1d();
    let (mut from, mut to) = (a, b);
    for _ in 0..4 {
        let left: f32 = load_global(from.wrapping_add(((i + n - 1) % n) as usize));
        let right: f32 = load_global(from.wrapping_add(((i + 1) % n) as usize));
        store_global(to.wrapping_add(i as usize), left + right);
        // SAFETY: `counter` is a buffer of one zero, used by this barrier only.
        unsafe { grid::sync(counter) };
        (from, to) = (to, from);
    }
}

#[test]
fn cooperative_grid_barrier() {
    let n = 4 * 96;
    let start: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
    let mut expected = start.clone();
    for _ in 0..4 {
        expected = (0..n)
            .map(|i| expected[(i + n - 1) % n] + expected[(i + 1) % n])
            .collect();
    }
    // Not reset between launches: the barrier leaves the counter ready for the next one.
    let counter = Buffer::from_slice(&[0u32]);
    for launch in orders(Launch::linear(4, 96).as_cooperative()) {
        let (a, b) = (Buffer::from_slice(&start), Buffer::<f32>::uninit(n));
        let args = [
            a.address(),
            b.address(),
            (n as u32).to_slot(),
            counter.address(),
        ];
        launch_entry(&DIFFUSE_ENTRY, &launch, &args).unwrap();
        assert_eq!(a.to_vec().unwrap(), expected);
        assert_eq!(counter.to_vec().unwrap()[0] & 0x7fff_ffff, 0);
    }
}

#[test]
fn a_large_cooperative_launch() {
    let counter = Buffer::from_slice(&[0u32]);
    let launch = Launch::linear(64, 256)
        .as_cooperative()
        .with_shared_bytes(1024);
    let report = cuda_std::emulator::launch("meet", &launch, || {
        // SAFETY: `counter` is a buffer of one zero, used by this barrier only.
        unsafe { grid::sync(counter.as_mut_ptr()) };
    })
    .unwrap();
    assert_eq!((report.threads, report.barriers), (16384, 128));
}

/// The last block to arrive sums what all blocks left: needs no cooperative launch.
#[kernel]
unsafe fn last_block_sums(parts: *mut u32, arrived: *mut u32, total: *mut u32) {
    let (block, blocks) = (thread::block_idx_x(), thread::grid_dim_x());
    if thread::thread_idx_x() == 0 {
        store_global(parts.wrapping_add(block as usize), block + 1);
        atomic::fence_acq_rel_gpu();
        // SAFETY: `arrived` is checked by the emulator.
        if unsafe { atomic::add_relaxed_gpu_u32(arrived, 1) } == blocks - 1 {
            atomic::fence_acq_rel_gpu();
            let sum = (0..blocks).map(|i| load_global(parts.wrapping_add(i as usize).cast_const()));
            store_global(total, sum.sum());
        }
    }
}

#[test]
fn the_last_block_sees_what_all_wrote() {
    for launch in orders(Launch::linear(50, 32)) {
        let (parts, arrived) = (Buffer::<u32>::uninit(50), Buffer::from_slice(&[0u32]));
        let total = Buffer::<u32>::uninit(1);
        let args = [parts.address(), arrived.address(), total.address()];
        launch_entry(&LAST_BLOCK_SUMS_ENTRY, &launch, &args).unwrap();
        assert_eq!(total.to_vec().unwrap(), [50 * 51 / 2]);
    }
}

#[test]
fn what_one_launch_wrote_is_constant_for_the_next() {
    let (x, y) = (Buffer::<f32>::uninit(32), Buffer::<f32>::uninit(32));
    let i = || thread::thread_idx_x() as usize;
    launch("fill", &Launch::linear(1, 32), || {
        store_global(x.as_mut_ptr().wrapping_add(i()), i() as f32);
    })
    .unwrap();
    launch("copy", &Launch::linear(1, 32), || {
        store_global(
            y.as_mut_ptr().wrapping_add(i()),
            load_global_nc(x.as_ptr().wrapping_add(i())),
        );
    })
    .unwrap();
    assert_eq!(y.to_vec().unwrap()[31], 31.0);
}

#[test]
fn a_fault_leaves_the_emulator_usable() {
    let y = Buffer::<f32>::uninit(64);
    for _ in 0..3 {
        let stuck = launch("stuck", &Launch::linear(1, 64), || {
            if thread::thread_idx_x() == 63 {
                load_global(y.as_ptr());
            }
            thread::sync_threads();
        });
        assert!(stuck.is_err());
        launch("fine", &Launch::linear(1, 64), thread::sync_threads).unwrap();
    }
}

/// Values are dropped when a fault cuts a thread short: its stack is unwound, not abandoned.
#[test]
fn a_fault_unwinds_the_threads_that_wait() {
    use std::rc::Rc;
    let held = Rc::new(());
    let result = launch("holds", &Launch::linear(1, 64), || {
        let _held = Rc::clone(&held);
        thread::sync_threads();
        load_global(std::ptr::null::<u32>());
    });
    assert!(result.is_err());
    assert_eq!(Rc::strong_count(&held), 1);
}

/// A bound generous enough for a busy machine: 500 blocks of 1024 threads with ten barriers each,
/// and a plain sum over 2 million values.
#[test]
fn emulation_is_fast_enough_for_tests() {
    let start = Instant::now();
    launch("barriers", &Launch::linear(50, 1024), || {
        for _ in 0..10 {
            thread::sync_threads();
        }
    })
    .unwrap();
    println!("512000 barrier arrivals: {:?}", start.elapsed());
    let (x, y) = (
        Buffer::from_slice(&vec![1.0f32; 2_000_000]),
        Buffer::<f32>::uninit(1000),
    );
    let args = [x.address(), y.address(), 2000u32.to_slot()];
    let start_sum = Instant::now();
    launch_entry(
        &ROW_SUM_ENTRY,
        &Launch::linear(1000, 256).with_shared_bytes(32),
        &args,
    )
    .unwrap();
    println!(
        "2 million loads in 256000 threads: {:?}",
        start_sum.elapsed()
    );
    assert_eq!(y.to_vec().unwrap(), [2000.0; 1000]);
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

/// A of small whole numbers, a half each; element `i` of the 16 x 16 (or 8) row by row.
fn a_element(row: usize, k: usize) -> f32 {
    (row * 3 + k * 5) as f32 % 17.0 - 8.0
}

fn b_element(k: usize, column: usize) -> f32 {
    (k * 7 + column * 11) as f32 % 13.0 - 6.0
}

fn pair(low: f32, high: f32) -> u32 {
    let bits = |x| u32::from(half::f16::from_f32(x).to_bits());
    bits(low) | bits(high) << 16
}

/// One warp's product in both forms; c is the row plus a hundredth of the column.
#[kernel]
unsafe fn warp_products(wide: *mut [f32; 4], narrow: *mut [f32; 4]) {
    let lane = warp::lane_id() as usize;
    let (g, q) = (lane / 4, lane % 4 * 2);
    let a = |row, k| pair(a_element(row, k), a_element(row, k + 1));
    let b = |k| pair(b_element(k, g), b_element(k + 1, g));
    let c = [0, 1, 2, 3].map(|i| (g + i / 2 * 8) as f32 + (q + i % 2) as f32 / 128.0);
    let fragments = [a(g, q), a(g + 8, q), a(g, q + 8), a(g + 8, q + 8)];
    let product = warp::mma_m16n8k16_f16(fragments, [b(q), b(q + 8)], c);
    store_global(wide.wrapping_add(lane), product);
    let first = warp::mma_m16n8k8_f16([fragments[0], fragments[1]], b(q), c);
    let second = warp::mma_m16n8k8_f16([fragments[2], fragments[3]], b(q + 8), first);
    store_global(narrow.wrapping_add(lane), second);
}

#[test]
fn a_warp_multiplies_matrices() {
    for launch in orders(Launch::new([1, 1, 1], [32, 1, 1])) {
        let wide = Buffer::<[f32; 4]>::uninit(32);
        let narrow = Buffer::<[f32; 4]>::uninit(32);
        let arguments = [wide.address(), narrow.address()];
        launch_entry(&WARP_PRODUCTS_ENTRY, &launch, &arguments).unwrap();
        let wide = wide.to_vec().unwrap();
        for (lane, product) in wide.iter().enumerate() {
            for (i, &got) in product.iter().enumerate() {
                let (row, column) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
                let sum: f32 = (0..16)
                    .map(|k| a_element(row, k) * b_element(k, column))
                    .sum();
                assert_eq!(got, sum + row as f32 + column as f32 / 128.0);
            }
        }
        assert_eq!(narrow.to_vec().unwrap(), wide);
    }
}

/// The upper half of the warp leaves out the product.
#[kernel]
unsafe fn half_a_warp_multiplies(y: *mut [f32; 4]) {
    let lane = warp::lane_id();
    if lane < 16 {
        let product = warp::mma_m16n8k16_f16([0; 4], [0; 2], [0.0; 4]);
        store_global(y.wrapping_add(lane as usize), product);
    }
}

#[test]
fn a_product_needs_the_whole_warp() {
    let y = Buffer::<[f32; 4]>::uninit(32);
    let launch = Launch::new([1, 1, 1], [32, 1, 1]);
    let fault = launch_entry(&HALF_A_WARP_MULTIPLIES_ENTRY, &launch, &[y.address()]).unwrap_err();
    assert!(fault.to_string().contains("mma.sync"), "{fault}");
}

/// Writes a 32 by 32 tile by rows, a warp a row, and reads it by columns.
#[kernel]
unsafe fn transposed(y: *mut u32, pitch: u32) {
    let (column, row) = (thread::thread_idx_x(), thread::thread_idx_y());
    let tile = |word: u32| dynamic_shared_mem().offset_bytes(4 * word).address();
    store_shared(tile(row * pitch + column), row * 32 + column);
    thread::sync_threads();
    let value: u32 = load_shared(tile(column * pitch + row));
    if row % 2 == 0 {
        store_global(y.wrapping_add((row * 32 + column) as usize), value);
    }
}

#[test]
fn bank_conflicts_are_counted_by_line() {
    for (pitch, worst) in [(32_u64, 31), (33, 0), (34, 1)] {
        let y = Buffer::<u32>::uninit(1024);
        for launch in orders(Launch::new([2, 1, 1], [32, 32, 1]).with_shared_bytes(32 * 34 * 4)) {
            count_conflicts();
            launch_entry(&TRANSPOSED_ENTRY, &launch, &[y.address(), pitch]).unwrap();
            let mut lines = take_conflicts();
            lines.sort_by_key(|line| line.location.line());
            let [stored, loaded] = lines.try_into().expect("two lines");
            assert!(stored.stores && !loaded.stores);
            assert_eq!((stored.kernel.as_str(), stored.bytes), ("transposed", 4));
            assert_eq!((stored.accesses, stored.extra), (64, 0));
            assert_eq!((loaded.accesses, loaded.worst), (64, worst));
            assert_eq!(loaded.extra, 64 * u64::from(worst));
        }
    }
    assert!(take_conflicts().is_empty(), "nothing is counted now");
}
