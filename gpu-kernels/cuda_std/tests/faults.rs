//! Wrong kernels, and what the emulator says of each: the rule, the kernel, the block, the thread
//! and the line, which carries a `// fault: <test>` mark here.

use cuda_std::emulator::access::{
    load_global, load_global_nc, load_shared, store_global, store_shared,
};
use cuda_std::emulator::{Buffer, Entry, Fault, FaultKind, KernelParam, Launch, launch_entry};
use cuda_std::shared::dynamic_shared_mem;
use cuda_std::{atomic, grid, kernel, thread, warp};

/// The fault that a launch ends with.
fn fault(entry: &Entry, launch: Launch, args: &[u64]) -> Fault {
    launch_entry(entry, &launch, args).expect_err("the kernel is wrong")
}

/// The fault's message names rule, kernel, block, thread and the marked line.
#[track_caller]
fn check(fault: &Fault, kind: FaultKind, at: (&str, u32, u32), mark: &str, detail: &str) {
    let (kernel, block, thread) = at;
    let text = fault.to_string();
    assert_eq!(fault.kind, kind, "{text}");
    let mut marks = include_str!("faults.rs").lines().zip(1..);
    let (_, line) = marks
        .find(|(line, _)| line.ends_with(&format!("// fault: {mark}")))
        .expect("a marked line");
    let place = format!("kernel `{kernel}`, block ({block}, 0, 0), thread ({thread}, 0, 0), ");
    assert!(text.starts_with(&place), "{text}\nnot at {place}");
    assert!(
        text.contains(&format!("tests/faults.rs:{line}:")),
        "{text}\nnot at line {line}"
    );
    assert!(text.contains(detail), "{text}\nlacks: {detail}");
}

#[kernel]
unsafe fn double_without_a_bound(x: *const f32, y: *mut f32) {
    let i = thread::index_1d() as usize;
    let value = load_global(x.wrapping_add(i)); // fault: load past the end
    store_global(y.wrapping_add(i), 2.0 * value);
}

#[test]
fn out_of_bounds_load() {
    let (x, y) = (Buffer::from_slice(&[1.0f32; 40]), Buffer::<f32>::uninit(64));
    let args = [x.address(), y.address()];
    let fault = fault(&DOUBLE_WITHOUT_A_BOUND_ENTRY, Launch::linear(2, 32), &args);
    let detail = "load of 4 bytes at byte 160 of a buffer of 160 bytes";
    check(
        &fault,
        FaultKind::OutOfBounds,
        ("double_without_a_bound", 1, 8),
        "load past the end",
        detail,
    );
}

#[kernel]
unsafe fn store_before(y: *mut f32, n: i32) {
    let i = thread::thread_idx_x() as isize - n as isize;
    store_global(y.wrapping_offset(i), 1.0); // fault: store before the start
}

#[test]
fn out_of_bounds_store_below_the_start_leaves_memory_alone() {
    let y = Buffer::from_slice(&[5.0f32; 8]);
    let args = [y.address(), 2i32.to_slot()];
    let fault = fault(&STORE_BEFORE_ENTRY, Launch::linear(1, 4), &args);
    let detail = "store of 4 bytes at byte -8 of a buffer of 32 bytes";
    check(
        &fault,
        FaultKind::OutOfBounds,
        ("store_before", 0, 0),
        "store before the start",
        detail,
    );
    assert_eq!(y.to_vec().unwrap(), [5.0; 8]);
}

#[test]
fn null_and_freed_buffers_are_out_of_bounds() {
    let null = fault(&STORE_BEFORE_ENTRY, Launch::linear(1, 1), &[0, 0]);
    assert_eq!(null.kind, FaultKind::OutOfBounds);
    assert!(null.detail.contains("a null pointer"), "{null}");
    let freed = Buffer::from_slice(&[0.0f32]).address();
    let freed = fault(&STORE_BEFORE_ENTRY, Launch::linear(1, 1), &[freed, 0]);
    assert_eq!(freed.kind, FaultKind::OutOfBounds);
    assert!(freed.detail.contains("has been freed"), "{freed}");
}

#[kernel]
unsafe fn shared_past_the_end() {
    let shared = dynamic_shared_mem();
    let rank = thread::thread_idx_x();
    store_shared(shared.offset_bytes(rank * 4).address(), 1.0f32); // fault: past shared memory
}

#[test]
fn out_of_bounds_shared() {
    let launch = Launch::linear(1, 64).with_shared_bytes(63 * 4);
    check(
        &fault(&SHARED_PAST_THE_END_ENTRY, launch, &[]),
        FaultKind::OutOfBounds,
        ("shared_past_the_end", 0, 63),
        "past shared memory",
        "store of 4 bytes at byte 252 of 252 bytes of shared memory",
    );
}

#[kernel]
unsafe fn vector_load_at_any_index(x: *const f32) {
    let p = x.wrapping_add(thread::thread_idx_x() as usize);
    load_global(p.cast::<[f32; 4]>()); // fault: misaligned
}

#[test]
fn misaligned_vector_load() {
    let x = Buffer::from_slice(&[0.0f32; 64]);
    check(
        &fault(
            &VECTOR_LOAD_AT_ANY_INDEX_ENTRY,
            Launch::linear(1, 4),
            &[x.address()],
        ),
        FaultKind::Misaligned,
        ("vector_load_at_any_index", 0, 1),
        "misaligned",
        "load of 16 bytes at byte 4",
    );
}

#[kernel]
unsafe fn accumulate_into(y: *mut f32) {
    let p = y.wrapping_add(thread::index_1d() as usize);
    store_global(p, load_global(p.cast_const()) + 1.0); // fault: unwritten global memory
}

#[test]
fn uninitialised_global_read() {
    let y = Buffer::<f32>::uninit(8);
    y.write(0, &[0.0; 5]);
    check(
        &fault(&ACCUMULATE_INTO_ENTRY, Launch::linear(1, 8), &[y.address()]),
        FaultKind::Uninitialised,
        ("accumulate_into", 0, 5),
        "unwritten global memory",
        "load of 4 bytes at byte 20 of a buffer: nothing wrote byte 20",
    );
    assert!(y.to_vec().unwrap_err().to_string().contains("element 5"));
}

#[kernel]
unsafe fn sum_more_than_was_staged(x: *const f32, y: *mut f32) {
    let (shared, rank) = (dynamic_shared_mem(), thread::thread_idx_x());
    if rank < 31 {
        store_shared(
            shared.offset_bytes(rank * 4).address(),
            load_global(x.wrapping_add(rank as usize)),
        );
    }
    thread::sync_threads();
    let value: f32 = load_shared(shared.offset_bytes(rank * 4).address()); // fault: unwritten shared memory
    store_global(y.wrapping_add(rank as usize), value);
}

#[test]
fn uninitialised_shared_read() {
    let (x, y) = (Buffer::from_slice(&[1.0f32; 32]), Buffer::<f32>::uninit(32));
    let launch = Launch::linear(1, 32).with_shared_bytes(128);
    check(
        &fault(
            &SUM_MORE_THAN_WAS_STAGED_ENTRY,
            launch,
            &[x.address(), y.address()],
        ),
        FaultKind::Uninitialised,
        ("sum_more_than_was_staged", 0, 31),
        "unwritten shared memory",
        "load of byte 124 of shared memory: nothing wrote it",
    );
}

#[kernel]
unsafe fn barrier_for_some(n: u32) {
    if thread::index_1d() < n {
        thread::sync_threads(); // fault: barrier for some
    }
}

#[test]
fn barrier_left_out_by_some() {
    let launch = Launch::linear(2, 64);
    let some = fault(&BARRIER_FOR_SOME_ENTRY, launch, &[100u32.to_slot()]);
    check(
        &some,
        FaultKind::Barrier,
        ("barrier_for_some", 1, 0),
        "barrier for some",
        "thread (36, 0, 0) has returned without it",
    );
    // In another order a thread may arrive when others have returned: the same rule is named.
    for seed in 0..20 {
        let some = fault(
            &BARRIER_FOR_SOME_ENTRY,
            launch.with_seed(seed),
            &[100u32.to_slot()],
        );
        assert_eq!(some.kind, FaultKind::Barrier);
    }
    assert!(launch_entry(&BARRIER_FOR_SOME_ENTRY, &launch, &[128u32.to_slot()]).is_ok());
}

#[kernel]
unsafe fn barrier_in_both_branches() {
    if thread::thread_idx_x() < 8 {
        thread::sync_threads();
    } else {
        thread::sync_threads(); // fault: the other branch
    }
}

#[test]
fn barrier_at_two_lines() {
    check(
        &fault(&BARRIER_IN_BOTH_BRANCHES_ENTRY, Launch::linear(1, 32), &[]),
        FaultKind::Barrier,
        ("barrier_in_both_branches", 0, 8),
        "the other branch",
        "the block is divided",
    );
}

#[kernel]
unsafe fn warp_barrier_against_block_barrier() {
    if thread::thread_idx_x() < 16 {
        warp::sync_warp(warp::FULL_MASK); // fault: warp barrier for some
    } else {
        thread::sync_threads();
    }
}

#[test]
fn warp_barrier_left_out_by_some() {
    check(
        &fault(
            &WARP_BARRIER_AGAINST_BLOCK_BARRIER_ENTRY,
            Launch::linear(1, 32),
            &[],
        ),
        FaultKind::Barrier,
        ("warp_barrier_against_block_barrier", 0, 0),
        "warp barrier for some",
        "lane 16 waits in the block barrier",
    );
}

#[kernel]
unsafe fn reverse_without_a_barrier(y: *mut u32, barriers: u32) {
    let (shared, rank) = (dynamic_shared_mem(), thread::thread_idx_x());
    let own = shared.offset_bytes(rank * 4).address();
    let other = shared
        .offset_bytes((thread::block_dim_x() - 1 - rank) * 4)
        .address();
    store_shared(own, 0u32);
    thread::sync_threads();
    store_shared(own, rank); // fault: load, then a store
    if barriers > 0 {
        thread::sync_threads();
    }
    let value: u32 = load_shared(other); // fault: store, then a load
    if barriers > 1 {
        thread::sync_threads();
    }
    store_shared(own, value);
    store_global(y.wrapping_add(rank as usize), value);
}

#[test]
fn shared_race_of_a_store_and_a_load() {
    let y = Buffer::<u32>::uninit(64);
    let launch = Launch::linear(1, 64).with_shared_bytes(256);
    let run = |barriers: u32| {
        launch_entry(
            &REVERSE_WITHOUT_A_BARRIER_ENTRY,
            &launch,
            &[y.address(), barriers.to_slot()],
        )
    };
    check(
        &run(0).unwrap_err(),
        FaultKind::Race,
        ("reverse_without_a_barrier", 0, 32),
        "load, then a store",
        "stores byte 128 of shared memory, which thread (31, 0, 0) loaded at",
    );
    check(
        &run(1).unwrap_err(),
        FaultKind::Race,
        ("reverse_without_a_barrier", 0, 32),
        "store, then a load",
        "loads byte 124 of shared memory, which thread (31, 0, 0) stored at",
    );
    assert!(run(2).is_ok());
    assert_eq!(y.to_vec().unwrap(), (0..64).rev().collect::<Vec<u32>>());
}

#[kernel]
unsafe fn lane_0_tells_the_warp(y: *mut u32, ordered: u32) {
    let (word, lane) = (dynamic_shared_mem().address(), warp::lane_id());
    if lane == 0 {
        store_shared(word, 7u32);
    }
    if ordered == 0 {
        // A shuffle makes lanes meet, but orders no memory.
        warp::shuffle_xor_u32(warp::FULL_MASK, lane, 1);
    } else {
        warp::sync_warp(warp::FULL_MASK);
    }
    let value: u32 = load_shared(word); // fault: a shuffle is no barrier
    store_global(y.wrapping_add(lane as usize), value);
}

#[test]
fn a_shuffle_orders_no_memory() {
    let y = Buffer::<u32>::uninit(32);
    let launch = Launch::linear(1, 32).with_shared_bytes(4);
    check(
        &fault(&LANE_0_TELLS_THE_WARP_ENTRY, launch, &[y.address(), 0]),
        FaultKind::Race,
        ("lane_0_tells_the_warp", 0, 1),
        "a shuffle is no barrier",
        "loads byte 0 of shared memory, which thread (0, 0, 0) stored at",
    );
    assert!(launch_entry(&LANE_0_TELLS_THE_WARP_ENTRY, &launch, &[y.address(), 1]).is_ok());
    assert_eq!(y.to_vec().unwrap(), [7; 32]);
}

#[kernel]
unsafe fn everyone_stores() {
    store_shared(dynamic_shared_mem().address(), thread::thread_idx_x()); // fault: two stores
}

#[test]
fn shared_race_of_two_stores() {
    check(
        &fault(
            &EVERYONE_STORES_ENTRY,
            Launch::linear(1, 2).with_shared_bytes(4),
            &[],
        ),
        FaultKind::Race,
        ("everyone_stores", 0, 1),
        "two stores",
        "stores byte 0 of shared memory, which thread (0, 0, 0) stored at",
    );
}

#[kernel]
unsafe fn sum_of_the_first(n: u32) {
    let lane = thread::thread_idx_x();
    if lane < n {
        warp::reduce_sum_f32(1.0); // fault: inactive lanes
    }
}

#[test]
fn shuffle_with_lanes_that_have_returned() {
    check(
        &fault(&SUM_OF_THE_FIRST_ENTRY, Launch::linear(1, 32), &[20]),
        FaultKind::Shuffle,
        ("sum_of_the_first", 0, 4),
        "inactive lanes",
        "shfl.sync.bfly by lane 4 reads lane 20, which has returned",
    );
    let partial_warp = fault(&SUM_OF_THE_FIRST_ENTRY, Launch::linear(1, 48), &[48]);
    assert_eq!(partial_warp.kind, FaultKind::Shuffle, "{partial_warp}");
}

#[kernel]
unsafe fn shuffle_against_barrier() {
    if thread::thread_idx_x() % 32 != 9 {
        warp::shuffle_idx_u32(warp::FULL_MASK, 1, 0); // fault: a lane at the barrier
    }
    thread::sync_threads();
}

#[test]
fn shuffle_with_a_lane_at_the_barrier() {
    check(
        &fault(&SHUFFLE_AGAINST_BARRIER_ENTRY, Launch::linear(1, 64), &[]),
        FaultKind::Shuffle,
        ("shuffle_against_barrier", 0, 0),
        "a lane at the barrier",
        "lane 9 waits in the block barrier",
    );
}

#[kernel]
unsafe fn shuffle_from_outside_the_mask() {
    if thread::thread_idx_x() < 16 {
        warp::shuffle_down_f32(0xffff, 1.0, 8); // fault: outside the mask
    }
}

#[test]
fn shuffle_that_reads_outside_its_mask() {
    check(
        &fault(
            &SHUFFLE_FROM_OUTSIDE_THE_MASK_ENTRY,
            Launch::linear(1, 32),
            &[],
        ),
        FaultKind::Shuffle,
        ("shuffle_from_outside_the_mask", 0, 8),
        "outside the mask",
        "reads lane 16, which is not in the mask 0x0000ffff",
    );
}

#[kernel]
unsafe fn vote_without_being_in_the_mask() {
    warp::ballot(0xffff, true); // fault: voter outside the mask
}

#[test]
fn vote_by_a_lane_outside_its_mask() {
    check(
        &fault(
            &VOTE_WITHOUT_BEING_IN_THE_MASK_ENTRY,
            Launch::linear(1, 32),
            &[],
        ),
        FaultKind::Shuffle,
        ("vote_without_being_in_the_mask", 0, 16),
        "voter outside the mask",
        "by lane 16, which is not in its mask",
    );
}

#[kernel]
unsafe fn write_then_read_constant(x: *mut f32) {
    store_global(x, 1.0);
    load_global_nc(x.cast_const()); // fault: not constant
}

#[test]
fn non_coherent_load_of_what_the_launch_wrote() {
    let x = Buffer::<f32>::uninit(1);
    check(
        &fault(
            &WRITE_THEN_READ_CONSTANT_ENTRY,
            Launch::linear(1, 1),
            &[x.address()],
        ),
        FaultKind::NonCoherentRead,
        ("write_then_read_constant", 0, 0),
        "not constant",
        "this launch wrote",
    );
}

#[kernel]
unsafe fn wait_for_a_flag(flag: *mut u32, writer: u32) {
    if thread::block_idx_x() == writer {
        // SAFETY: `flag` is checked by the emulator.
        unsafe { atomic::red_release_gpu_add_u32(flag, 1) };
    } else {
        // SAFETY: as above.
        while unsafe { atomic::load_acquire_gpu_u32(flag) } == 0 {} // fault: nobody sets it
    }
}

#[test]
fn polling_for_what_never_comes_is_a_deadlock() {
    let flag = Buffer::from_slice(&[0u32]);
    let args = [flag.address(), 9u32.to_slot()];
    check(
        &fault(
            &WAIT_FOR_A_FLAG_ENTRY,
            Launch::linear(3, 32).as_cooperative(),
            &args,
        ),
        FaultKind::Deadlock,
        ("wait_for_a_flag", 0, 0),
        "nobody sets it",
        "96 threads poll and 0 wait",
    );
    // The writer comes last: only when all are resident can the others wait for it.
    let args = [flag.address(), 2u32.to_slot()];
    let plain = fault(&WAIT_FOR_A_FLAG_ENTRY, Launch::linear(3, 32), &args);
    assert!(
        plain.to_string().contains("the launch is not cooperative"),
        "{plain}"
    );
    let cooperative = Launch::linear(3, 32).as_cooperative();
    assert!(launch_entry(&WAIT_FOR_A_FLAG_ENTRY, &cooperative, &args).is_ok());
}

#[kernel]
unsafe fn wait_with_a_plain_load(flag: *const u32) {
    while load_global(flag) == 0 {} // fault: a plain load
}

#[test]
fn polling_with_a_plain_load_is_a_deadlock() {
    let flag = Buffer::from_slice(&[0u32]);
    check(
        &fault(
            &WAIT_WITH_A_PLAIN_LOAD_ENTRY,
            Launch::linear(1, 1),
            &[flag.address()],
        ),
        FaultKind::Deadlock,
        ("wait_with_a_plain_load", 0, 0),
        "a plain load",
        "an endless loop",
    );
}

#[kernel]
unsafe fn grid_barrier(counter: *mut u32, blocks: u32) {
    if thread::block_idx_x() < blocks {
        // SAFETY: `counter` is checked by the emulator.
        unsafe { grid::sync(counter) };
    }
}

#[test]
fn grid_barrier_left_out_by_a_block() {
    let counter = Buffer::from_slice(&[0u32]);
    let launch = Launch::linear(4, 64).as_cooperative();
    let some = fault(&GRID_BARRIER_ENTRY, launch, &[counter.address(), 3]);
    assert_eq!(some.kind, FaultKind::Deadlock, "{some}");
    assert!(
        some.to_string().contains("3 threads poll and 189 wait"),
        "{some}"
    );
    let plain = fault(
        &GRID_BARRIER_ENTRY,
        Launch::linear(4, 64),
        &[counter.address(), 4],
    );
    assert!(plain.to_string().contains("not cooperative"), "{plain}");
}

#[kernel]
unsafe fn index_a_table(n: u32) {
    let table = [1u32, 2, 3];
    assert!(table[(thread::thread_idx_x() % n) as usize] > 0);
}

#[test]
fn a_panic_names_the_thread() {
    let panicked = fault(&INDEX_A_TABLE_ENTRY, Launch::linear(1, 32), &[4]);
    assert_eq!(panicked.kind, FaultKind::Panic);
    let text = panicked.to_string();
    assert!(
        text.starts_with("kernel `index_a_table`, block (0, 0, 0), thread (3, 0, 0)"),
        "{text}"
    );
    assert!(text.contains("index out of bounds"), "{text}");
    assert!(launch_entry(&INDEX_A_TABLE_ENTRY, &Launch::linear(1, 32), &[3]).is_ok());
}

#[test]
fn launches_that_a_device_refuses() {
    let refused = |launch: Launch, args: &[u64]| {
        let refused = fault(&INDEX_A_TABLE_ENTRY, launch, args);
        assert_eq!(refused.kind, FaultKind::InvalidLaunch);
        refused.detail
    };
    assert!(refused(Launch::linear(1, 1025), &[3]).contains("1025 x 1 x 1 threads"));
    assert!(refused(Launch::linear(0, 32), &[3]).contains("0 x 1 x 1 blocks"));
    assert!(refused(Launch::new([1, 65536, 1], [32, 1, 1]), &[3]).contains("65536"));
    let shared = Launch::linear(1, 32).with_shared_bytes(300 * 1024);
    assert!(refused(shared, &[3]).contains("bytes of shared memory"));
    let many = Launch::linear(100_000, 64).as_cooperative();
    assert!(refused(many, &[3]).contains("6400000 threads in a cooperative launch"));
    assert!(refused(Launch::linear(1, 32), &[3, 4]).contains("1 parameters"));
}
