//! The size and form of a key/value cache.

use models::arch::Config;

/// How a cache holds keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvForm {
    /// Both as f16.
    #[default]
    K16V16,
    /// Keys as f16, values as bytes with an f16 scale a position and head. Keys keep their bits: those
    /// of Qwen2 reach into the hundreds in some elements, which leaves 8 bits nothing for the others.
    K16V8,
}

/// The cache that a backend is built with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvCache {
    /// Tokens that it holds.
    pub tokens: usize,
    /// How it holds them.
    pub form: KvForm,
}

/// A cache of f16 for that many tokens.
impl From<usize> for KvCache {
    fn from(tokens: usize) -> KvCache {
        KvCache {
            tokens,
            form: KvForm::default(),
        }
    }
}

impl KvCache {
    /// Bytes of keys and values of a model of `config`; `None` if they are 2^64 or more.
    pub fn bytes(&self, config: &Config) -> Option<u64> {
        let heads = (config.layers as u64).checked_mul(config.kv_heads as u64)?;
        let width = config.head_dim as u64;
        let head = match self.form {
            KvForm::K16V16 => width.checked_mul(4)?,
            KvForm::K16V8 => width.checked_mul(3)?.checked_add(2)?,
        };
        heads.checked_mul(head)?.checked_mul(self.tokens as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_cache() {
        let shape = models::synthetic::shape("tiny-qwen2").expect("a named shape");
        let bytes = models::synthetic::to_vec(shape, &models::synthetic::Options::default());
        let bytes = bytes.expect("a model");
        let gguf = models::file::gguf::Gguf::parse(&bytes).expect("a valid file");
        let config = models::arch::recipe(&gguf).expect("a recipe").config;
        let heads = (config.layers * config.kv_heads) as u64;
        let width = config.head_dim as u64;
        let mut cache = KvCache::from(10);
        assert_eq!(cache.bytes(&config), Some(10 * heads * 4 * width));
        cache.form = KvForm::K16V8;
        assert_eq!(cache.bytes(&config), Some(10 * heads * (3 * width + 2)));
        cache.tokens = usize::MAX;
        assert_eq!(cache.bytes(&config), None);
    }
}
