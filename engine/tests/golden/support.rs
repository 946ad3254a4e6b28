//! Where the data is, models loaded once, and the devices that tests run on.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use engine::backend::{Backend, Choice, KvCache, LoadedModel, Tier, select};
use engine::chat::ChatTemplate;
use engine::tokenizer::Tokenizer;
use engine::weights::ModelFile;
use serde::de::DeserializeOwned;

/// What a test runs on.
#[derive(Debug, Clone, Copy)]
pub enum Device {
    /// The CPU backend.
    Cpu,
    /// The CUDA backend with the PTX of one tier.
    Cuda(Tier),
}

/// Makes a test of `fn(Device)` for each device; one that is absent prints why it is skipped.
macro_rules! on_every_device {
    ($test:path) => {
        #[test]
        fn cpu() {
            crate::support::on(crate::support::Device::Cpu, $test);
        }
        crate::support::on_every_tier!($test);
    };
}
pub(crate) use on_every_device;

/// As [`on_every_device`], on GPUs alone.
macro_rules! on_every_tier {
    ($test:path) => {
        #[test]
        fn cuda_sm_75() {
            crate::support::on(
                crate::support::Device::Cuda(engine::backend::Tier::SM_75),
                $test,
            );
        }
        #[test]
        fn cuda_sm_80() {
            crate::support::on(
                crate::support::Device::Cuda(engine::backend::Tier::SM_80),
                $test,
            );
        }
        #[test]
        fn cuda_sm_90() {
            crate::support::on(
                crate::support::Device::Cuda(engine::backend::Tier::SM_90),
                $test,
            );
        }
        #[test]
        fn cuda_sm_90a() {
            crate::support::on(
                crate::support::Device::Cuda(engine::backend::Tier::SM_90A),
                $test,
            );
        }
    };
}
pub(crate) use on_every_tier;

/// One test of a backend at a time: each CPU backend has a thread for every core.
static RUNNING: Mutex<()> = Mutex::new(());

/// Runs `test` on `device`, or prints why not.
pub fn on(device: Device, test: fn(Device)) {
    if let Device::Cuda(tier) = device
        && let Err(why) = cuda_runs(tier)
    {
        println!("skipped: {why}");
        return;
    }
    // A test that failed leaves nothing behind that the next one could trip over.
    let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    test(device);
}

/// Whether there is a GPU that runs the kernels of `tier`.
#[cfg(feature = "cuda")]
fn cuda_runs(tier: Tier) -> Result<(), String> {
    use engine::backend::cuda::{available, device};

    available().map_err(|why| format!("no GPU ({why})"))?;
    match device::capability().expect("compute capability") {
        capability if !tier.runs_on(capability) => {
            Err(format!("the GPU is sm_{capability}, it cannot run {tier}"))
        }
        _ => Ok(()),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda_runs(_: Tier) -> Result<(), String> {
    Err("no GPU (built without CUDA)".to_owned())
}

/// A backend for `model` on `device`.
pub fn backend(
    device: Device,
    model: &Arc<LoadedModel>,
    cache: impl Into<KvCache>,
) -> Box<dyn Backend> {
    let (choice, tier) = match device {
        Device::Cpu => (Choice::Cpu, None),
        Device::Cuda(tier) => (Choice::Cuda, Some(tier)),
    };
    let selected = select(choice, Arc::clone(model), cache, tier).expect("backend");
    let info = selected.backend.info();
    match device {
        Device::Cpu => assert_eq!(info.name, "cpu"),
        Device::Cuda(tier) => {
            assert_eq!((info.name, &*info.tier), ("cuda", &*tier.to_string()))
        }
    }
    selected.backend
}

/// Path of a file of golden data.
pub fn data_path(name: &str) -> PathBuf {
    let folder = std::env::var_os("EDGELLM_GOLDEN_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
        PathBuf::from,
    );
    folder.join(name)
}

/// A file of golden data.
pub fn data(name: &str) -> Vec<u8> {
    let path = data_path(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A file of golden data that holds 32-bit floats.
pub fn floats(name: &str) -> Vec<f32> {
    let bytes = data(name);
    let (values, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty(), "{name}");
    values.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// A JSON file of golden data.
pub fn json<T: DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&data(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// A model in memory with its tokenizer.
pub struct Loaded {
    /// Weights and recipe.
    pub model: Arc<LoadedModel>,
    /// Tokenizer.
    pub tokenizer: Tokenizer,
    /// Chat template, if the file has one.
    pub chat: Option<ChatTemplate>,
}

/// Loads the model at `path`.
pub fn load(path: &Path) -> Loaded {
    let file = ModelFile::open(path).expect("model file");
    let parsed = file.parse().expect("a model");
    let recipe = file.recipe(&parsed).expect("recipe");
    let tokenizer = file.tokenizer(&parsed, &recipe).expect("tokenizer");
    let chat = file
        .chat_template(&parsed, &tokenizer)
        .expect("chat template");
    let model = Arc::new(file.load(&parsed, recipe).expect("weights"));
    Loaded {
        model,
        tokenizer,
        chat,
    }
}

/// The default model, loaded once.
pub fn default_model() -> &'static Loaded {
    static MODEL: OnceLock<Loaded> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = std::env::var_os("EDGELLM_MODEL").map_or_else(
            || {
                let catalog = models::catalog::Catalog::builtin().expect("catalog");
                Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("../models/files")
                    .join(&catalog.default_model().file)
            },
            PathBuf::from,
        );
        assert!(
            path.is_file(),
            "{} is missing: run `cargo xtask model fetch`",
            path.display()
        );
        load(&path)
    })
}

/// `(cosine, largest difference over largest reference)` of two vectors.
pub fn agreement(have: &[f32], want: &[f32]) -> (f64, f64) {
    assert_eq!(have.len(), want.len());
    let (mut dot, mut have2, mut want2) = (0.0f64, 0.0f64, 0.0f64);
    let (mut largest, mut difference) = (0.0f64, 0.0f64);
    for (&h, &w) in have.iter().zip(want) {
        let (h, w) = (f64::from(h), f64::from(w));
        assert!(h.is_finite(), "a logit is {h}");
        dot += h * w;
        have2 += h * h;
        want2 += w * w;
        largest = largest.max(w.abs());
        difference = difference.max((h - w).abs());
    }
    (dot / (have2 * want2).sqrt(), difference / largest)
}
