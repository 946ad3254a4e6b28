//! A decode step on the CPU allocates nothing, on any thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::backend::cpu::CpuBackend;
use engine::backend::{Backend, LoadedModel};
use engine::sampler::Sampling;
use models::file::gguf::{DType, Gguf};
use models::synthetic::{self, Options};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.realloc(start, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// The only test of this file: another one's allocations would count.
#[test]
fn decode_steps_allocate_nothing() {
    let options = Options {
        seed: 3,
        linear: DType::Q4_1,
        embedding: DType::Q8_0,
    };
    let bytes = synthetic::to_vec(synthetic::shape("tiny").unwrap(), &options).unwrap();
    let file = Gguf::parse(&bytes).unwrap();
    let recipe = models::arch::recipe(&file).unwrap();
    let weights = recipe.weights.iter();
    let weights = weights.map(|w| models::weights::decode(&file, w).unwrap());
    let model = {
        let weights = weights.collect();
        Arc::new(LoadedModel::new(recipe, weights))
    };
    let mut backend = CpuBackend::new(model, 64).unwrap();
    backend.prefill(&[1, 2, 3]).unwrap();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    assert!(before > 0, "the allocator does not count");
    for _ in 0..32 {
        let token = backend.choose(&Sampling::GREEDY).unwrap();
        backend.decode(token).unwrap();
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), before);
}
