//! `config.json`, as `transformers` writes it in versions 4 (`rope_theta`, `rope_scaling`) and 5
//! (`rope_parameters`). A key whose value is null is a key that is not there.

use serde_json::{Map, Value};

use super::{HuggingFace, Packing};
use crate::Error;
use crate::arch::{
    self, Config, Field, Keys, MAX_DIMENSION, Stretch, Window, WindowLayers, positive,
};
use crate::error::shown;
use crate::file::Source;

/// `max_window_layers` of Qwen's files that leave it out: layers before this one see everything.
const QWEN_FULL_LAYERS: u64 = 28;
/// Tensor of the embedding table.
const TABLE: &str = "model.embed_tokens.weight";

pub(super) fn config(folder: &HuggingFace<'_>) -> Result<Config, Error> {
    let keys = JsonKeys {
        object: &folder.config,
        within: "",
    };
    let model_type = keys
        .string("model_type")?
        .ok_or_else(|| missing("model_type"))?;
    let architecture = arch::find(model_type, |a| a.hugging_face)?;
    keys.refuse_unsupported(architecture.family.gate.activation())?;
    let mut config = arch::read(&keys, architecture.name, vocab(folder, &keys)?)?;
    if let Some(name) = keys.string("_name_or_path")?
        && !name.is_empty()
    {
        config.name = name.rsplit('/').next().unwrap_or(name).to_owned();
    } else {
        // The engine puts the folder's name here.
        config.name = String::new();
    }
    config.tied = keys
        .bool("tie_word_embeddings")?
        .unwrap_or_else(|| folder.tensor("lm_head.weight").is_none());
    let rope = keys.rope()?;
    if let Some(theta) = rope.number("rope_theta")? {
        config.rope_theta = positive(theta).map_err(|why| rope.refuse("rope_theta", why))?;
    }
    config.rope_divisors = rope_divisors(&rope, &config)?;
    config.int8_activations = matches!(folder.packing, Some(Packing::BitNet { .. }));
    config.window = keys.window(model_type, &config)?;
    Ok(config)
}

/// Rows of the embedding table, which the configuration has to agree with.
fn vocab(folder: &HuggingFace<'_>, keys: &JsonKeys<'_>) -> Result<usize, Error> {
    let rows = folder.require_tensor(TABLE)?.shape().0 as u64;
    match keys.whole("vocab_size")? {
        Some(claim) if claim != rows => Err(keys.refuse(
            "vocab_size",
            format!("vocabulary of {claim} tokens, but {TABLE} has {rows} rows"),
        )),
        _ if rows > MAX_DIMENSION => Err(folder
            .require_tensor(TABLE)?
            .fail(format!("{rows} rows are more than {MAX_DIMENSION}"))),
        _ => Ok(rows as usize),
    }
}

/// A JSON object whose values are read by key; `within` is what messages put before the key.
pub(super) struct JsonKeys<'a> {
    pub object: &'a Map<String, Value>,
    pub within: &'static str,
}

fn missing(key: &str) -> Error {
    Error::MissingKey { key: shown(key) }
}

impl Keys for JsonKeys<'_> {
    fn key(&self, field: Field) -> String {
        match field {
            Field::Layers => "num_hidden_layers",
            Field::Width => "hidden_size",
            Field::Ffn => "intermediate_size",
            Field::Heads => "num_attention_heads",
            Field::KvHeads => "num_key_value_heads",
            Field::HeadDim => "head_dim",
            Field::Context => "max_position_embeddings",
            Field::RopeTheta => "rope_theta",
            Field::NormEps => "rms_norm_eps",
        }
        .to_owned()
    }

    fn integer(&self, field: Field) -> Result<Option<u64>, Error> {
        self.whole(&self.key(field))
    }

    fn float(&self, field: Field) -> Result<Option<f64>, Error> {
        self.number(&self.key(field))
    }
}

impl<'a> JsonKeys<'a> {
    fn full(&self, key: &str) -> String {
        match self.within {
            "" => key.to_owned(),
            within => format!("{within}.{key}"),
        }
    }

    pub fn refuse(&self, key: &str, reason: String) -> Error {
        Error::KeyValue {
            key: shown(&self.full(key)),
            reason,
        }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        convert(value).map(Some).ok_or_else(|| Error::KeyType {
            key: shown(&self.full(key)),
            found: match value {
                Value::Bool(_) => "a bool",
                Value::Number(_) => "another number",
                Value::String(_) => "a string",
                Value::Array(_) => "an array",
                Value::Object(_) => "an object",
                Value::Null => "null",
            }
            .to_owned(),
            expected,
        })
    }

    pub fn string(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "a bool", Value::as_bool)
    }

    /// A whole number of 0 or more.
    pub fn whole(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "a whole number of 0 or more", Value::as_u64)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// The texts of a list; none where there is no list.
    pub fn strings(&self, key: &str) -> Result<Vec<&'a str>, Error> {
        let list = self.typed(key, "a list of strings", |value| {
            value.as_array()?.iter().map(Value::as_str).collect()
        })?;
        Ok(list.unwrap_or_default())
    }

    pub fn object(&self, key: &'static str) -> Result<Option<JsonKeys<'a>>, Error> {
        let object = self.typed(key, "an object", Value::as_object)?;
        Ok(object.map(|object| JsonKeys {
            object,
            within: key,
        }))
    }

    /// Settings that change the result and that the recipe cannot express.
    fn refuse_unsupported(&self, activation: &str) -> Result<(), Error> {
        if let Some(act) = self.string("hidden_act")?
            && act != activation
        {
            let reason = format!("{} is not supported: {activation} is", shown(act));
            return Err(self.refuse("hidden_act", reason));
        }
        if let Some(part) = self.number("partial_rotary_factor")?
            && part != 1.0
        {
            let reason = format!("{part} is not supported");
            return Err(self.refuse("partial_rotary_factor", reason));
        }
        Ok(())
    }

    /// Attention's window, in the layers of `layer_types`, or without it from `max_window_layers` on.
    fn window(&self, model_type: &str, config: &Config) -> Result<Option<Window>, Error> {
        let is_qwen = matches!(model_type, "qwen2" | "qwen3");
        // Qwen's files name a window and say beside it that it is not used.
        let used = !is_qwen || self.bool("use_sliding_window")?.unwrap_or(false);
        let kinds = self.strings("layer_types")?;
        let known = ["full_attention", "sliding_attention"];
        if let Some(kind) = kinds.iter().find(|kind| !known.contains(kind)) {
            let reason = format!("{} is not supported", shown(kind));
            return Err(self.refuse("layer_types", reason));
        }
        if !kinds.is_empty() && kinds.len() != config.layers {
            let reason = format!("{} kinds for {} layers", kinds.len(), config.layers);
            return Err(self.refuse("layer_types", reason));
        }
        let window = match self.whole("sliding_window")?.filter(|_| used) {
            Some(window) => window,
            None if kinds.contains(&known[1]) => return Err(missing("sliding_window")),
            None => return Ok(None),
        };
        if window >= config.context as u64 {
            return Ok(None);
        }
        if window == 0 || !is_qwen {
            let reason = format!("attention windows ({window} tokens) are not supported here");
            return Err(self.refuse("sliding_window", reason));
        }
        let first = self.whole("max_window_layers")?;
        let first = first.unwrap_or(QWEN_FULL_LAYERS).min(MAX_DIMENSION);
        let layers = match kinds.is_empty() {
            true => WindowLayers::From(first as usize),
            false => WindowLayers::Listed(kinds.iter().map(|kind| *kind == known[1]).collect()),
        };
        let tokens = window as usize;
        Ok(Some(Window { tokens, layers }))
    }

    /// The rotary settings of either version; the file itself where it has none apart.
    fn rope(&self) -> Result<JsonKeys<'a>, Error> {
        for key in ["rope_parameters", "rope_scaling"] {
            if let Some(rope) = self.object(key)? {
                return Ok(rope);
            }
        }
        Ok(JsonKeys {
            object: self.object,
            within: self.within,
        })
    }
}

fn rope_divisors(rope: &JsonKeys<'_>, config: &Config) -> Result<Option<Vec<f32>>, Error> {
    let required = |key: &str| -> Result<f64, Error> {
        let value = rope.number(key)?.ok_or_else(|| missing(&rope.full(key)))?;
        positive(value)
            .map(f64::from)
            .map_err(|why| rope.refuse(key, why))
    };
    if let Some(part) = rope.number("partial_rotary_factor")?
        && part != 1.0
    {
        let reason = format!("{part} is not supported");
        return Err(rope.refuse("partial_rotary_factor", reason));
    }
    let kind = match rope.string("rope_type")? {
        Some(kind) => kind,
        None => rope.string("type")?.unwrap_or("default"),
    };
    match kind {
        "default" => Ok(None),
        "linear" => Ok(Some(vec![required("factor")? as f32; config.head_dim / 2])),
        "llama3" => {
            let stretch = Stretch {
                factor: required("factor")?,
                low_turns: required("low_freq_factor")?,
                high_turns: required("high_freq_factor")?,
                original_context: required("original_max_position_embeddings")?,
            };
            if stretch.low_turns >= stretch.high_turns {
                let reason = format!("{} is not above low_freq_factor", stretch.high_turns);
                return Err(rope.refuse("high_freq_factor", reason));
            }
            Ok(Some(
                stretch.divisors(config.head_dim, f64::from(config.rope_theta)),
            ))
        }
        other => {
            let reason = format!(
                "{} is not supported: default, linear and llama3 are",
                shown(other)
            );
            Err(rope.refuse("rope_type", reason))
        }
    }
}
