//! The backend seam: a [`Backend`] compiles a model's recipe once, at load, and then moves tokens.

mod cache;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod fuse;
mod select;
mod tier;

use models::quant::Weight;
use models::recipe::Recipe;

use crate::Error;
use crate::sampler::Sampling;
use crate::weights::Pages;

pub use cache::{KvCache, KvForm};
pub use select::{Choice, Selected, select};
pub use tier::Tier;

/// A model in memory: what every backend is built from.
#[derive(Debug)]
pub struct LoadedModel {
    /// Forward pass.
    pub recipe: Recipe,
    /// Decoded tensors, indexed by [`WeightId`](models::recipe::WeightId).
    pub weights: Vec<Weight>,
    /// The file that weights lie in, where they are used in place.
    pub file: Option<Pages>,
}

impl LoadedModel {
    /// A model whose weights lie in no file.
    pub fn new(recipe: Recipe, weights: Vec<Weight>) -> LoadedModel {
        LoadedModel {
            recipe,
            weights,
            file: None,
        }
    }

    /// Weight bytes that one decoded token reads: every matrix and vector once, of a table that
    /// is only looked up one row. `bytes_of` says what a weight takes.
    pub fn bytes_per_token(&self, bytes_of: impl Fn(&Weight) -> u64) -> u64 {
        use models::recipe::Step;
        let mut whole = vec![false; self.weights.len()];
        let mut row = vec![false; self.weights.len()];
        for step in &self.recipe.steps {
            match step {
                Step::Embed { table, .. } => row[*table] = true,
                Step::RmsNorm { weight, .. } | Step::HeadNorm { weight, .. } => {
                    whole[*weight] = true
                }
                Step::Linear { weight, bias, .. } => {
                    whole[*weight] = true;
                    if let Some(bias) = bias {
                        whole[*bias] = true;
                    }
                }
                Step::Logits { table, .. } => whole[*table] = true,
                Step::Rope { .. }
                | Step::KvAppend { .. }
                | Step::Attention { .. }
                | Step::RoundToInt8 { .. }
                | Step::SwiGlu { .. }
                | Step::ReluSquaredGlu { .. }
                | Step::Add { .. } => {}
            }
        }
        self.weights
            .iter()
            .enumerate()
            .map(|(id, weight)| {
                let (bytes, rows) = (bytes_of(weight), weight.shape().0 as u64);
                match (whole[id], row[id]) {
                    (true, _) => bytes,
                    (false, true) => bytes / rows.max(1),
                    (false, false) => 0,
                }
            })
            .sum()
    }
}

/// What runs the model and why it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendInfo {
    /// `cpu` or `cuda`.
    pub name: &'static str,
    /// Instruction tier in use: `sm_90`, `avx512`, …
    pub tier: String,
    /// Device name as the driver or the system gives it.
    pub device: String,
    /// Why this backend was chosen.
    pub reason: String,
    /// Weight bytes read for one decoded token.
    pub bytes_per_token: u64,
}

/// Where the time of one token goes.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    /// Bytes a second that plain reading of this machine's memory reaches.
    pub read_bytes_per_second: f64,
    /// Device memory that the model takes by now, weights, cache and buffers, without what the driver
    /// keeps for itself; none where it is not a device's.
    pub memory_bytes: Option<u64>,
    /// Kernels of a token, in order of first use; none where they were not asked for or cannot be
    /// told apart.
    pub kernels: Vec<KernelTime>,
}

/// The launches of a token that do the same in different layers.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// What they compute.
    pub step: String,
    /// Kernel.
    pub kernel: &'static str,
    /// How it is launched and why so; empty where there is no choice.
    pub launch: String,
    /// Launches.
    pub launches: usize,
    /// By how much they make the token longer, all together, microseconds.
    pub us: f64,
}

/// What [`Backend::prefill_logits`] does where nothing is faster.
fn logits_one_by_one(
    backend: &mut (impl Backend + ?Sized),
    tokens: &[u32],
) -> Result<Vec<f32>, Error> {
    if tokens.is_empty() {
        return Err(Error::input("no tokens to append"));
    }
    let mut all = Vec::new();
    for token in tokens {
        backend.decode(*token)?;
        all.extend(backend.logits()?);
    }
    Ok(all)
}

/// Moves tokens through one model. The KV cache belongs to the backend; its capacity and form are
/// given to the constructor.
pub trait Backend {
    /// What this backend is.
    fn info(&self) -> &BackendInfo;

    /// Appends `tokens` to the cache; a token can then be chosen after the last one.
    ///
    /// # Errors
    /// [`Error::Input`] if `tokens` is empty, holds an id outside the vocabulary, or does not fit
    /// in the context.
    fn prefill(&mut self, tokens: &[u32]) -> Result<(), Error>;

    /// Appends one token. Cheapest with the one that [`Backend::choose`] has just given.
    ///
    /// # Errors
    /// As [`Backend::prefill`].
    fn decode(&mut self, token: u32) -> Result<(), Error>;

    /// The token to follow the last one appended: of the same tokens and sampling always the same,
    /// on every backend up to the rounding of the logits. Where choices are appended by
    /// [`Backend::decode`], a device may compute a few tokens ahead.
    ///
    /// # Errors
    /// [`Error::Machine`] if nothing was appended yet or the device fails.
    fn choose(&mut self, sampling: &Sampling) -> Result<u32, Error>;

    /// `(V,)` logits of the last token.
    ///
    /// # Errors
    /// [`Error::Machine`] if nothing was appended yet or the device fails.
    fn logits(&mut self) -> Result<Vec<f32>, Error>;

    /// Appends `tokens` and returns the `(T, V)` logits of every one of them, for scoring a text.
    /// The caller cuts a long text: the result is as large as that.
    ///
    /// # Errors
    /// As [`Backend::prefill`].
    fn prefill_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        logits_one_by_one(self, tokens)
    }

    /// Tokens of a prompt that are best given at once.
    fn prompt_run_tokens(&self) -> usize {
        256
    }

    /// The tokens in the cache.
    fn tokens(&self) -> &[u32];

    /// How many they are.
    fn position(&self) -> usize {
        self.tokens().len()
    }

    /// Empties the cache but for the first `tokens`, if it has more. There are no logits then until
    /// a token is appended.
    fn rewind(&mut self, tokens: usize);

    /// Measures how fast memory is read here and, with `kernels`, where the time of the token after
    /// the last one goes. There are no logits then until a token is appended.
    ///
    /// # Errors
    /// [`Error::Machine`] if nothing was appended yet, the context is full, or the device fails.
    fn profile(&mut self, kernels: bool) -> Result<Profile, Error>;
}
