//! How the linear layers of a checkpoint are packed: `quantization_config`.

use serde_json::{Map, Value};

use super::config::JsonKeys;
use crate::Error;
use crate::error::shown;
use crate::file::{DType, Tensor};

/// The packing of the linear layers; a layer that has a plain `weight` is not packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// `qweight` `(k, n/8)`, `qzeros` `(groups, n/8)` int32, nibbles of a word in the order
    /// 0 2 4 6 1 3 5 7; `scales` `(groups, n)`.
    Awq {
        /// Weights that share a scale; `None`: all of a row.
        group: Option<usize>,
    },
    /// `qweight` `(k/8, n)`, `qzeros` `(groups, n/8)` int32, nibbles in order; `scales` `(groups, n)`.
    Gptq {
        /// Weights that share a scale; `None`: all of a row.
        group: Option<usize>,
        /// Stored zero points are one less than those meant (format `gptq`, not `gptq_v2`).
        zero_is_one_less: bool,
        /// Columns may have been sorted by activation (`desc_act`): only `g_idx` tells which group each is in.
        sorted: bool,
    },
    /// `weight` `(n/4, k)` uint8 and `weight_scale`, or floats that are rounded to ternary.
    BitNet {
        /// `weight_scale` divides (`bitlinear`) or multiplies (`autobitlinear`).
        scale_divides: bool,
        /// Weights are floats (`online`).
        floats: bool,
    },
}

impl Packing {
    pub(super) fn from_config(config: &Map<String, Value>) -> Result<Option<Packing>, Error> {
        let keys = JsonKeys {
            object: config,
            within: "",
        };
        let Some(keys) = keys.object("quantization_config")? else {
            return Ok(None);
        };
        let method = keys.string("quant_method")?.unwrap_or_default();
        match method {
            "awq" => awq(&keys),
            "gptq" => gptq(&keys),
            "bitnet" => bitnet(&keys),
            other => Err(keys.refuse(
                "quant_method",
                format!(
                    "{} is not supported: awq, gptq and bitnet are",
                    shown(other)
                ),
            )),
        }
        .map(Some)
    }

    /// Checks that what `modules_to_not_convert` names is not packed. A layer that it does not name may be
    /// plain all the same: the tensors say what is packed.
    pub(super) fn check_exceptions(
        &self,
        config: &Map<String, Value>,
        tensors: &[Tensor<'_>],
    ) -> Result<(), Error> {
        const KEY: &str = "modules_to_not_convert";
        let keys = JsonKeys {
            object: config,
            within: "",
        };
        let Some(keys) = keys.object("quantization_config")? else {
            return Ok(());
        };
        for module in keys.strings(KEY)? {
            let packed = tensors.iter().find(|tensor| {
                let named = !module.is_empty() && tensor.name.contains(module);
                named && self.packs(tensor)
            });
            if let Some(tensor) = packed {
                let reason = match self {
                    Packing::BitNet { .. } => {
                        "is ternary, or its inputs are rounded to 8 bits: exceptions among the linear layers \
                         are not supported, a checkpoint without them is"
                    }
                    _ => "is packed: take it from the list, or unpack it",
                };
                let reason = format!(
                    "{} names {}, which {reason}",
                    shown(module),
                    shown(tensor.name)
                );
                return Err(keys.refuse(KEY, reason));
            }
        }
        Ok(())
    }

    /// Whether a tensor is one of a packed layer.
    fn packs(&self, tensor: &Tensor<'_>) -> bool {
        match self {
            Packing::Awq { .. } | Packing::Gptq { .. } => tensor.name.ends_with(".qweight"),
            Packing::BitNet { .. } => {
                tensor.name.ends_with("_proj.weight")
                    && (tensor.dtype == DType::U8 || tensor.dtype.is_float())
            }
        }
    }
}

/// The text under `key` is `known`, or nothing.
fn only(keys: &JsonKeys<'_>, key: &str, known: &[&str]) -> Result<(), Error> {
    match keys.string(key)? {
        Some(found) if !known.contains(&found.to_ascii_lowercase().as_str()) => Err(keys.refuse(
            key,
            format!("{} is not supported: {} is", shown(found), known.join(", ")),
        )),
        _ => Ok(()),
    }
}

fn four_bits(keys: &JsonKeys<'_>, names: [&str; 2]) -> Result<(), Error> {
    for name in names {
        if let Some(bits) = keys.whole(name)? {
            return match bits {
                4 => Ok(()),
                bits => Err(keys.refuse(name, format!("{bits} is not supported: 4 is"))),
            };
        }
    }
    Ok(())
}

/// Weights that share a scale, a multiple of 32; -1 is the whole row.
fn group(keys: &JsonKeys<'_>, names: [&str; 2]) -> Result<Option<usize>, Error> {
    for name in names {
        match keys.number(name)? {
            None => {}
            Some(-1.0) => return Ok(None),
            Some(group) => {
                let whole = group as usize;
                return match whole as f64 == group && whole > 0 && whole.is_multiple_of(32) {
                    true => Ok(Some(whole)),
                    false => Err(keys.refuse(
                        name,
                        format!("{group} is not supported: multiples of 32 and -1 are"),
                    )),
                };
            }
        }
    }
    Err(Error::MissingKey {
        key: shown(&format!("quantization_config.{}", names[0])),
    })
}

fn awq(keys: &JsonKeys<'_>) -> Result<Packing, Error> {
    four_bits(keys, ["bits", "w_bit"])?;
    only(keys, "version", &["gemm"])?;
    Ok(Packing::Awq {
        group: group(keys, ["group_size", "q_group_size"])?,
    })
}

fn gptq(keys: &JsonKeys<'_>) -> Result<Packing, Error> {
    four_bits(keys, ["bits", "bits"])?;
    only(keys, "checkpoint_format", &["gptq", "gptq_v2"])?;
    if let Some(rules) = keys.object("dynamic")?
        && !rules.object.is_empty()
    {
        let reason = "settings a layer are not supported".to_owned();
        return Err(keys.refuse("dynamic", reason));
    }
    Ok(Packing::Gptq {
        group: group(keys, ["group_size", "group_size"])?,
        zero_is_one_less: keys.string("checkpoint_format")? != Some("gptq_v2"),
        sorted: keys.bool("desc_act")? == Some(true),
    })
}

fn bitnet(keys: &JsonKeys<'_>) -> Result<Packing, Error> {
    only(keys, "linear_class", &["bitlinear", "autobitlinear"])?;
    only(keys, "quantization_mode", &["offline", "online"])?;
    if keys.bool("use_rms_norm")? == Some(true) {
        let reason = "a norm inside the linear layers is not supported".to_owned();
        return Err(keys.refuse("use_rms_norm", reason));
    }
    Ok(Packing::BitNet {
        scale_divides: keys.string("linear_class")? != Some("autobitlinear"),
        floats: keys.string("quantization_mode")? == Some("online"),
    })
}
