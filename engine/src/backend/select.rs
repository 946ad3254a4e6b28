//! Which backend runs a model, and why.

use std::sync::Arc;

use super::{Backend, KvCache, LoadedModel, Tier};
use crate::Error;

/// What the caller asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// CUDA where it works, the CPU otherwise.
    Auto,
    /// CUDA or an error.
    Cuda,
    /// The CPU.
    Cpu,
}

/// A backend and the reason for it.
pub struct Selected {
    /// The backend, its cache empty.
    pub backend: Box<dyn Backend>,
    /// Why it was chosen.
    pub reason: String,
}

/// Builds the backend for `model` with a cache: its size and form, or tokens as f16. `tier` forces a PTX
/// tier, which also means that only CUDA will do.
///
/// # Errors
/// [`Error::Machine`] if the chosen backend cannot run here, [`Error::Input`] if the cache holds nothing
/// or a tier is asked of the CPU.
pub fn select(
    choice: Choice,
    model: Arc<LoadedModel>,
    cache: impl Into<KvCache>,
    tier: Option<Tier>,
) -> Result<Selected, Error> {
    let cache = cache.into();
    if cache.tokens == 0 {
        return Err(Error::Input(
            "the context must hold at least one token".into(),
        ));
    }
    let why = match (choice, tier) {
        (Choice::Cpu, Some(_)) => {
            return Err(Error::Input(
                "--tier chooses among CUDA tiers, not with --backend cpu".into(),
            ));
        }
        (Choice::Cpu, None) => "asked for".to_owned(),
        (Choice::Auto, None) => match cuda(&model, cache, None) {
            Ok(backend) => return Ok(Selected::new(backend, None)),
            // Also where the model is what it cannot run: the CPU may.
            Err(error) => error.to_string(),
        },
        (Choice::Cuda, _) | (Choice::Auto, Some(_)) => {
            return Ok(Selected::new(cuda(&model, cache, tier)?, Some("asked for")));
        }
    };
    check_cache_fits(&model, cache)?;
    let backend = super::cpu::CpuBackend::new(model, cache)?;
    Ok(Selected::new(Box::new(backend), Some(&why)))
}

impl Selected {
    /// `backend`, chosen because of `why` and of what it says itself.
    fn new(backend: Box<dyn Backend>, why: Option<&str>) -> Self {
        let own = backend.info().reason.as_str();
        let reason = match why {
            Some(why) => format!("{why}; {own}"),
            None => own.to_owned(),
        };
        Selected { backend, reason }
    }
}

#[cfg(feature = "cuda")]
fn cuda(
    model: &LoadedModel,
    cache: KvCache,
    tier: Option<Tier>,
) -> Result<Box<dyn Backend>, Error> {
    Ok(Box::new(super::cuda::CudaBackend::new(model, cache, tier)?))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: &LoadedModel, _: KvCache, _: Option<Tier>) -> Result<Box<dyn Backend>, Error> {
    Err(Error::Machine("this binary was built without CUDA".into()))
}

/// Refuses a key/value cache that this machine's memory cannot hold, before it is allocated.
fn check_cache_fits(model: &LoadedModel, cache: KvCache) -> Result<(), Error> {
    let context = cache.tokens;
    let needed = cache
        .bytes(&model.recipe.config)
        .and_then(|bytes| usize::try_from(bytes).ok());
    let fits = needed.is_some_and(|bytes| {
        // The allocator knows limits that the system's figure does not show.
        available_memory_bytes().is_none_or(|available| bytes as u64 <= available)
            && Vec::<u8>::new().try_reserve_exact(bytes).is_ok()
    });
    match fits {
        true => Ok(()),
        false => Err(Error::Machine(format!(
            "a context of {context} tokens needs {} of memory for keys and values, more than there is: lower --context",
            match needed {
                Some(bytes) => format!("{:.1} GB", bytes as f64 / 1e9),
                None => "more than any machine's".to_owned(),
            }
        ))),
    }
}

/// Memory that can be used without swapping, where the system tells.
fn available_memory_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
