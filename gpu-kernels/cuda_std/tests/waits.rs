//! Blocks that wait for each other, rightly and wrongly, in many orders.

use cuda_std::emulator::access::{load_global, store_global};
use cuda_std::emulator::{Buffer, Entry, Fault, FaultKind, KernelParam, Launch, launch_entry};
use cuda_std::{atomic, kernel, thread};

/// What becomes of a launch of three blocks side by side, in order and in random orders; `before` each.
fn outcomes(entry: &Entry, args: &[u64], before: impl Fn()) -> Vec<Result<(), Fault>> {
    let launch = Launch::linear(3, 64).as_cooperative();
    let random = (0..20).map(|seed| launch.with_seed(seed));
    std::iter::once(launch)
        .chain(random)
        .map(|launch| {
            before();
            launch_entry(entry, &launch, args).map(|_| ())
        })
        .collect()
}

#[track_caller]
fn all_miss_a_wait(outcomes: &[Result<(), Fault>], details: [&str; 2]) {
    for outcome in outcomes {
        let fault = outcome.as_ref().expect_err("the kernel is wrong");
        assert_eq!(fault.kind, FaultKind::MissingWait, "{fault}");
        let text = fault.to_string();
        assert!(text.contains("tests/waits.rs:"), "{text}");
        assert!(details.iter().any(|detail| text.contains(detail)), "{text}");
    }
}

/// Block 0 leaves a number in `data`, the others take it; `how` they wait for it.
#[kernel]
unsafe fn hand_over(data: *mut u32, flag: *mut u32, out: *mut u32, how: u32) {
    const NOT_AT_ALL: u32 = 0;
    const RELAXED: u32 = 1;
    const FENCES: u32 = 2;
    let (block, rank) = (thread::block_idx_x(), thread::thread_idx_x());
    // SAFETY: buffers are checked by the emulator.
    unsafe {
        if block == 0 {
            if rank == 0 {
                store_global(data, 7);
                match how {
                    NOT_AT_ALL => {}
                    RELAXED => atomic::store_relaxed_gpu_u32(flag, 1),
                    FENCES => {
                        atomic::fence_acq_rel_gpu();
                        atomic::store_relaxed_gpu_u32(flag, 1);
                    }
                    _ => atomic::red_release_gpu_add_u32(flag, 1),
                }
            }
            return;
        }
        if rank == 0 {
            match how {
                NOT_AT_ALL => {}
                RELAXED => while atomic::load_relaxed_gpu_v4_u32(flag)[0] == 0 {},
                FENCES => {
                    while atomic::load_relaxed_gpu_v4_u32(flag)[0] == 0 {}
                    atomic::fence_acq_rel_gpu();
                }
                _ => while atomic::load_acquire_gpu_u32(flag) == 0 {},
            }
        }
        thread::sync_threads();
        store_global(
            out.wrapping_add((block * 64 + rank) as usize),
            load_global(data.cast_const()),
        );
    }
}

fn hand_over_outcomes(how: u32) -> Vec<Result<(), Fault>> {
    let data = Buffer::from_slice(&[3u32]);
    let flag = Buffer::from_slice(&[0u32; 4]);
    let out = Buffer::<u32>::uninit(3 * 64);
    let args = [data.address(), flag.address(), out.address(), how.to_slot()];
    outcomes(&HAND_OVER_ENTRY, &args, || {
        data.write(0, &[3]);
        flag.write(0, &[0; 4]);
    })
}

#[test]
fn a_word_that_is_not_waited_for() {
    let outcomes = hand_over_outcomes(0);
    let details = [
        "load of a word that block 0 has stored",
        "store of a word that block",
    ];
    all_miss_a_wait(&outcomes, details);
    // Either of the two may come first.
    for detail in details {
        let seen = |o: &Result<(), Fault>| matches!(o, Err(f) if f.to_string().contains(detail));
        assert!(outcomes.iter().any(seen), "never: {detail}");
    }
}

#[test]
fn a_flag_that_orders_nothing() {
    let outcomes = hand_over_outcomes(1);
    let detail = "load of a word that block 0 has stored";
    all_miss_a_wait(&outcomes, [detail; 2]);
}

#[test]
fn release_and_acquire_and_fences_order() {
    for how in [2, 3] {
        for outcome in hand_over_outcomes(how) {
            outcome.unwrap_or_else(|fault| panic!("{how}: {fault}"));
        }
    }
}

/// Words that tell by themselves whether they are there need no order.
#[kernel]
unsafe fn pass_on(words: *mut u64) {
    let block = thread::block_idx_x();
    // SAFETY: buffers are checked by the emulator.
    unsafe {
        if thread::thread_idx_x() == 0 {
            let mut sum = 1;
            if block > 0 {
                let from = words.wrapping_add(2 * (block as usize - 1));
                while sum == 1 {
                    let [word, _] = atomic::load_relaxed_gpu_v2_u64(from);
                    sum += word;
                }
            }
            atomic::store_relaxed_gpu_u64(words.wrapping_add(2 * block as usize), sum);
        }
    }
}

#[test]
fn words_that_tell_by_themselves() {
    for seed in 0..20 {
        let words = Buffer::from_slice(&[0u64; 6]);
        let launch = Launch::linear(3, 32).as_cooperative().with_seed(seed);
        launch_entry(&PASS_ON_ENTRY, &launch, &[words.address()]).expect("a chain");
        assert_eq!(words.to_vec().expect("written"), [1, 0, 2, 0, 3, 0]);
    }
}

/// Each block waits for the next one.
#[kernel]
unsafe fn wait_in_a_ring(flags: *mut u32) {
    let (block, blocks) = (thread::block_idx_x(), thread::grid_dim_x());
    // SAFETY: buffers are checked by the emulator.
    unsafe {
        if thread::thread_idx_x() == 0 {
            let next = flags.wrapping_add(((block + 1) % blocks) as usize);
            while atomic::load_acquire_gpu_u32(next) == 0 {}
            atomic::red_release_gpu_add_u32(flags.wrapping_add(block as usize), 1);
        }
    }
}

#[test]
fn a_ring_of_waits_is_a_deadlock() {
    let flags = Buffer::from_slice(&[0u32; 3]);
    for outcome in outcomes(&WAIT_IN_A_RING_ENTRY, &[flags.address()], || ()) {
        let fault = outcome.expect_err("nobody can go first");
        assert_eq!(fault.kind, FaultKind::Deadlock, "{fault}");
    }
}
