//! What the file says of its weights, and the tensors that follow from it.

use serde::{Deserialize, Serialize};

use super::fail;
use crate::Error;
use crate::error::shown;
use crate::file::{DType, Tensor};
use crate::quant::int4_tiled::{Order, TILE_COLS, TILE_ROWS};
use crate::quant::{Int4Form, Int4Shape, Weight};

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "format", rename_all = "snake_case", deny_unknown_fields)]
pub enum Layout {
    /// [`Int4Tiled`](crate::quant::Int4Tiled), in the tiles of a [`Pack`].
    Int4 {
        /// Weights that share a scale.
        group: usize,
        /// What the levels stand for.
        form: Int4Form,
    },
    /// The same with zeros.
    Int4Zeros {
        /// Weights that share a scale.
        group: usize,
    },
    /// [`Int8Matrix`](crate::quant::Int8Matrix).
    Int8 {
        /// Weights that share a scale.
        group: usize,
    },
    /// [`TernaryMatrix`](crate::quant::TernaryMatrix).
    Ternary {
        /// Weights that share a scale.
        group: usize,
    },
    /// [`F16Matrix`](crate::quant::F16Matrix).
    F16,
    /// A vector of 32-bit floats; `rows` is 1.
    F32,
}

/// One weight of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredWeight {
    /// Name.
    pub name: String,
    /// N.
    pub rows: usize,
    /// K.
    pub cols: usize,
    /// How it is stored.
    #[serde(flatten)]
    pub layout: Layout,
}

/// INT4 matrices that share tiles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// Name of the tensors.
    pub name: String,
    /// Where the rows of each matrix are.
    #[serde(flatten)]
    pub order: Order,
    /// Names of the matrices.
    pub members: Vec<String>,
}

/// A tensor of the file that is a part of a weight.
pub(super) struct Part {
    pub name: String,
    pub dtype: DType,
    /// Outermost first.
    pub shape: Vec<u64>,
    pub bytes: u64,
}

impl StoredWeight {
    /// How `weight` is stored under `name`.
    pub fn of(name: String, weight: &Weight) -> StoredWeight {
        let (rows, cols) = weight.shape();
        let layout = match (weight, weight.int4()) {
            (_, Some(Int4Shape { group, zeros, .. })) if zeros => Layout::Int4Zeros { group },
            (_, Some(shape)) => Layout::Int4 {
                group: shape.group,
                form: match shape.has_mins {
                    true => Int4Form::Asymmetric,
                    false => Int4Form::Symmetric,
                },
            },
            (Weight::Int8(m), _) => Layout::Int8 { group: m.group },
            (Weight::Ternary(m), _) => Layout::Ternary { group: m.group },
            (Weight::F16(_), _) => Layout::F16,
            (Weight::Vector(_) | Weight::Int4(_) | Weight::Int4Tiled(_), _) => Layout::F32,
        };
        StoredWeight {
            name,
            rows,
            cols,
            layout,
        }
    }

    /// Shape and form of an INT4 matrix; `None` for other weights.
    pub fn int4(&self) -> Option<Int4Shape> {
        let (group, has_mins, zeros) = match self.layout {
            Layout::Int4 { group, form } => (group, form == Int4Form::Asymmetric, false),
            Layout::Int4Zeros { group } => (group, true, true),
            _ => return None,
        };
        Some(Int4Shape {
            rows: self.rows,
            cols: self.cols,
            group,
            has_mins,
            zeros,
        })
    }

    /// Bytes of levels and scales, without what fills up tiles and pages.
    ///
    /// # Errors
    /// A size that overflows, a group of zero.
    pub fn bytes(&self) -> Result<u64, Error> {
        let parts = match self.int4() {
            None => self.parts()?,
            Some(shape) => {
                let groups = self.groups(shape.group)?;
                let mut parts = vec![
                    self.part(".quants", DType::U8, self.cols as u64 / 2)?,
                    self.part(".scales", DType::F16, groups)?,
                ];
                if shape.has_mins {
                    parts.push(self.part(".mins", DType::F16, groups)?);
                }
                parts
            }
        };
        Ok(parts.iter().map(|part| part.bytes).sum())
    }

    /// The tensors that make up a weight that is not INT4, in file order; of INT4 the pack's do.
    pub(super) fn parts(&self) -> Result<Vec<Part>, Error> {
        let cols = self.cols as u64;
        Ok(match self.layout {
            Layout::Int4 { .. } | Layout::Int4Zeros { .. } => Vec::new(),
            Layout::Int8 { group } => vec![
                self.part(".quants", DType::I8, cols)?,
                self.part(".scales", DType::F16, self.groups(group)?)?,
            ],
            Layout::Ternary { group } => vec![
                self.part(".quants", DType::U8, cols / 4)?,
                self.part(".scales", DType::F32, self.groups(group)?)?,
            ],
            Layout::F16 => vec![self.part("", DType::F16, cols)?],
            Layout::F32 => vec![part(&self.name, "", DType::F32, vec![cols])?],
        })
    }

    /// A part whose rows are the weight's.
    fn part(&self, suffix: &str, dtype: DType, cols: u64) -> Result<Part, Error> {
        part(&self.name, suffix, dtype, vec![self.rows as u64, cols])
    }

    /// Groups a row.
    fn groups(&self, group: usize) -> Result<u64, Error> {
        match group {
            0 => Err(self.fail("group is 0")),
            _ => Ok((self.cols as u64).div_ceil(group as u64)),
        }
    }

    pub(super) fn fail(&self, reason: impl Into<String>) -> Error {
        fail(&self.name, reason)
    }
}

impl Pack {
    /// Matrices that share tiles, under a name made of theirs: `a.q_proj+k_proj.weight`.
    pub fn new(order: Order, members: Vec<String>) -> Pack {
        const SUFFIX: &str = ".weight";
        let stem = |name: &str| name.strip_suffix(SUFFIX).unwrap_or(name).to_owned();
        let name = match &members[..] {
            [] => String::new(),
            [only] => only.clone(),
            [first, others @ ..] => {
                let first = stem(first);
                let parent = first.rsplit_once('.').map_or("", |(parent, _)| parent);
                let leaves = others.iter().map(|name| {
                    let name = stem(name);
                    let leaf = name.strip_prefix(parent).unwrap_or(&name);
                    format!("+{}", leaf.trim_start_matches('.'))
                });
                first.clone() + &leaves.collect::<String>() + SUFFIX
            }
        };
        Pack {
            name,
            order,
            members,
        }
    }

    /// The tensors that hold the tiles of `members`, in file order, and the form of these.
    ///
    /// # Errors
    /// Matrices that are not INT4 or cannot share tiles, a size that overflows.
    pub(super) fn parts(&self, members: &[&StoredWeight]) -> Result<(Vec<Part>, Int4Shape), Error> {
        let mut first: Option<Int4Shape> = None;
        for member in members {
            let shape = member
                .int4()
                .ok_or_else(|| member.fail("shares tiles and is not INT4"))?;
            if !matches!(shape.group, 32 | 64 | 128) {
                return Err(member.fail(format!("group is {}, it is 32, 64 or 128", shape.group)));
            }
            if !first.get_or_insert(shape).fits(shape) {
                return Err(member.fail(format!(
                    "differs from what it shares {} with",
                    shown(&self.name)
                )));
            }
        }
        let members: Vec<usize> = members.iter().map(|member| member.rows).collect();
        let rows = self
            .order
            .packed_rows(&members)
            .map_err(|error| self.fail(error))?;
        // There is one: no matrix is an error of the order.
        let shape = first.ok_or_else(|| fail(&self.name, "no matrix"))?;
        let tiles = [
            rows.div_ceil(TILE_ROWS) as u64,
            shape.cols.div_ceil(TILE_COLS) as u64,
        ];
        let of_tile = |last: usize| vec![tiles[0], tiles[1], last as u64];
        let scales = TILE_ROWS * (TILE_COLS / shape.group);
        let part = |suffix, dtype, last| part(&self.name, suffix, dtype, of_tile(last));
        let mut parts = vec![
            part(".quants", DType::U32, TILE_ROWS * TILE_COLS / 8)?,
            part(".scales", DType::F16, scales)?,
        ];
        if shape.has_mins {
            parts.push(part(".mins", DType::F16, scales)?);
        }
        Ok((parts, shape))
    }

    /// An error of the matrices as an error of the tensors.
    pub(super) fn fail(&self, error: Error) -> Error {
        match error {
            Error::Matrix { reason, .. } => fail(&self.name, reason),
            other => other,
        }
    }
}

fn part(name: &str, suffix: &str, dtype: DType, shape: Vec<u64>) -> Result<Part, Error> {
    // Fastest first there; a product of the same factors.
    let bytes = dtype
        .tensor_bytes(&shape)
        .ok_or_else(|| fail(name, format!("its size of {shape:?} overflows")))?;
    Ok(Part {
        name: format!("{name}{suffix}"),
        dtype,
        shape,
        bytes,
    })
}

impl Part {
    /// Whether the file has this part.
    pub fn check(&self, tensor: Option<&Tensor<'_>>) -> Result<(), String> {
        let name = shown(&self.name);
        let tensor = tensor.ok_or_else(|| format!("its tensor {name} is missing"))?;
        let same = tensor.dtype == self.dtype && tensor.dims.iter().rev().eq(&self.shape);
        match same {
            true => Ok(()),
            false => Err(format!(
                "its tensor {name} is {} {:?}, expected {} {:?}",
                tensor.dtype.name(),
                tensor.dims.iter().rev().collect::<Vec<_>>(),
                self.dtype.name(),
                self.shape
            )),
        }
    }
}
