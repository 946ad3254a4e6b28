//! What a file merely claims is never allocated: peak heap use is measured while hostile files
//! are read. One test only, since the allocator counts for the whole process.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Raw, Tensor, edited, set, synthetic_bytes};
use models::arch::recipe;
use models::file::gguf::{DType, Gguf, Value};
use models::weights::decode;

/// The system allocator, counting live bytes and their peak.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator with the caller's own arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Peak of the bytes that `work` has allocated at one time.
fn peak_bytes(work: impl FnOnce()) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work();
    PEAK.load(Ordering::Relaxed) - before
}

/// Reads a file to the end of what it allows; gives whether it was refused.
fn refused(bytes: &[u8]) -> bool {
    let read = || {
        let gguf = Gguf::parse(bytes)?;
        let recipe = recipe(&gguf)?;
        recipe
            .weights
            .iter()
            .try_for_each(|weight| decode(&gguf, weight).map(|_| ()))
    };
    read().is_err_and(|error: models::Error| error.to_string().len() < 400)
}

#[test]
fn claims_cost_nothing() {
    let huge = 1u64 << 60;
    let key = || Raw::head(3, 0, 1).string("k").u32(9);
    let tiny = synthetic_bytes("tiny");
    let with = |name: &'static str, value: Value<'static>| {
        edited(&tiny, |entries| set(entries, name, value), |_| {})
    };
    let hostile = [
        ("tensor count", Raw::head(3, huge, 0).data(64).0),
        ("entry count", Raw::head(3, 0, huge).data(64).0),
        ("key length", Raw::head(3, 0, 1).u64(huge).data(64).0),
        (
            "string length",
            Raw::head(3, 0, 1).string("k").u32(8).u64(huge).data(64).0,
        ),
        ("integer array", key().u32(4).u64(huge).data(64).0),
        ("string array", key().u32(8).u64(huge).data(64).0),
        ("bool array", key().u32(7).u64(huge).data(64).0),
        ("nested array", key().u32(9).u64(huge).data(64).0),
        ("tensor name", Raw::head(3, 1, 0).u64(huge).data(64).0),
        (
            "tensor size",
            Raw::head(3, 1, 0)
                .tensor("t", &[huge], DType::I8.id(), 0)
                .data(64)
                .0,
        ),
        (
            "dimensions",
            Raw::head(3, 1, 0).string("t").u32(u32::MAX).data(64).0,
        ),
    ];
    for (what, bytes) in &hostile {
        let mut was_refused = false;
        let peak = peak_bytes(|| was_refused = refused(bytes));
        assert!(was_refused, "{what} was accepted");
        assert!(peak < 16 * 1024, "{what}: {peak} bytes");
    }

    // Claims of the metadata, in a file that is whole otherwise.
    let claims = [
        (
            "layers",
            with("llama.block_count", Value::U32(i32::MAX as u32)),
        ),
        ("width", with("llama.embedding_length", Value::U32(1 << 30))),
        (
            "heads",
            with("llama.attention.head_count", Value::U32(1 << 26)),
        ),
        (
            "head width",
            with("llama.attention.key_length", Value::U32(1 << 25)),
        ),
        ("vocabulary", with("llama.vocab_size", Value::U32(u32::MAX))),
    ];
    for (what, bytes) in &claims {
        let mut was_refused = false;
        let peak = peak_bytes(|| was_refused = refused(bytes));
        assert!(was_refused, "{what} was accepted");
        assert!(
            peak < 4 * bytes.len(),
            "{what}: {peak} bytes for a file of {}",
            bytes.len()
        );
    }

    // A good file costs its tables, not its data.
    let large = edited(
        &tiny,
        |_| {},
        |tensors: &mut Vec<Tensor>| {
            tensors.push(Tensor {
                name: "large".to_owned(),
                dims: vec![1 << 22],
                dtype: DType::F32,
                data: vec![0; 1 << 24],
            });
        },
    );
    let peak = peak_bytes(|| assert_eq!(Gguf::parse(&large).unwrap().tensors.len(), 21));
    assert!(
        peak < 32 * 1024,
        "{peak} bytes for the tables of 21 tensors"
    );
}
