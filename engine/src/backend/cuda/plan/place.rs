//! Weights in device memory: as they are, or packed into the tiles of the matrix units.

use std::borrow::Cow;
use std::sync::Arc;

use cust::memory::bytemuck;
use gpu_kernels::launch::DeviceSlice;
use half::f16;
use half::slice::HalfFloatSliceExt;
use models::quant::int4_tiled::{TILE_COLS, TILE_ROWS};
use models::quant::{Int4Matrix, Int4Shape, Int4Tiled, Int8Matrix, Weight};
use models::recipe::WeightId;

use super::{Compiler, bytes_of};
use crate::Error;
use crate::backend::LoadedModel;
use crate::backend::fuse::{Product, Then};

/// A weight in device memory, as it is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Placed {
    Int8 {
        rows: usize,
        cols: usize,
        group: usize,
        quants: DeviceSlice,
        scales: DeviceSlice,
    },
    F16 {
        rows: usize,
        cols: usize,
        values: DeviceSlice,
    },
    Vector(DeviceSlice),
}

/// Matrices of a product in device memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlacedTiles {
    /// N: rows of the result.
    pub rows: usize,
    pub cols: usize,
    pub group: usize,
    pub quants: DeviceSlice,
    pub scales: DeviceSlice,
    pub mins: DeviceSlice,
    /// The minima are zeros.
    pub zeros: bool,
}

/// A product's operands in device memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlacedProduct {
    pub tiles: PlacedTiles,
    /// Biases one after the other, or none.
    pub bias: DeviceSlice,
    /// Weights of the norm in front, or none.
    pub gain: DeviceSlice,
    /// What multiplies the sums, a row each, or none.
    pub row_scales: DeviceSlice,
}

/// The shape of a weight that is INT4, or becomes it: ternary matrices have no kernel of their own here.
pub(super) fn int4(model: &LoadedModel, id: WeightId) -> Option<Int4Shape> {
    match model.weights.get(id)? {
        Weight::Ternary(matrix) => Some(matrix.int4()),
        other => other.int4(),
    }
}

fn require_int4(model: &LoadedModel, id: WeightId) -> Result<Int4Shape, Error> {
    int4(model, id).ok_or_else(|| wrong_kind(model, id, "a 4-bit matrix"))
}

/// The scales of rows that a product of levels is multiplied by: all matrices are ternary and have one a row.
fn row_scales(model: &LoadedModel, product: &Product) -> Option<Vec<f32>> {
    product.sums?;
    let mut all = Vec::new();
    for id in &product.matrices {
        match model.weights.get(*id) {
            Some(Weight::Ternary(matrix)) if matrix.groups_per_row() == 1 => {
                all.extend_from_slice(&matrix.scales);
            }
            _ => return None,
        }
    }
    Some(all)
}

fn wrong_kind(model: &LoadedModel, id: WeightId, wanted: &str) -> Error {
    let weight = model.recipe.weights.get(id);
    let name = weight.map_or("?", |weight| weight.name.as_str());
    Error::input(format!("tensor {name} should be {wanted}"))
}

/// The matrices of a product as one, in tiles: those of the file where it has them so.
///
/// # Errors
/// Matrices that do not fit each other.
pub(super) fn pack(model: &LoadedModel, product: &Product) -> Result<Arc<Int4Tiled>, Error> {
    let order = product.order(model.recipe.config.head_dim);
    if let Some(tiles) = stored(model, product)
        && tiles.order == order
    {
        return Ok(Arc::clone(tiles));
    }
    let has_row_scales = row_scales(model, product).is_some();
    let matrices = product
        .matrices
        .iter()
        .map(|id| match model.weights.get(*id) {
            Some(Weight::Int4(matrix)) => Ok(Cow::Borrowed(matrix)),
            Some(Weight::Int4Tiled(part)) => Ok(Cow::Owned(part.in_rows())),
            Some(Weight::Ternary(matrix)) => match has_row_scales {
                true => matrix.levels_to_int4(),
                false => matrix.to_int4(),
            }
            .map(Cow::Owned)
            .map_err(|error| {
                let name = model.recipe.weights.get(*id).map_or("?", |w| &w.name);
                Error::Input(format!("tensor {name}: {error}"))
            }),
            _ => Err(wrong_kind(model, *id, "a 4-bit matrix")),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let matrices: Vec<&Int4Matrix> = matrices.iter().map(AsRef::as_ref).collect();
    let tiled = Int4Tiled::pack_as(order, &matrices).map_err(Error::input)?;
    Ok(Arc::new(tiled))
}

/// The tiles that hold the matrices of a product, all of them in order and nothing else.
fn stored<'m>(model: &'m LoadedModel, product: &Product) -> Option<&'m Arc<Int4Tiled>> {
    let part = |id: &WeightId| match model.weights.get(*id) {
        Some(Weight::Int4Tiled(part)) => Some(part),
        _ => None,
    };
    let tiles = part(product.matrices.first()?)?.tiles();
    let is_next = |(i, id): (usize, &WeightId)| {
        part(id).is_some_and(|part| Arc::ptr_eq(part.tiles(), tiles) && part.member() == i)
    };
    let all = product.matrices.len() == tiles.members.len()
        && product.matrices.iter().enumerate().all(is_next);
    all.then_some(tiles)
}

fn halves(values: &[f16]) -> &[u8] {
    bytemuck::cast_slice(values.reinterpret_cast())
}

impl Compiler<'_> {
    /// A weight that a step uses as it is.
    pub(super) fn weight(&mut self, id: WeightId) -> Result<Placed, Error> {
        if let Some(Some(placed)) = self.weights.get(id) {
            return Ok(*placed);
        }
        let placed = match self.model.weights.get(id) {
            Some(Weight::Int8(Int8Matrix {
                rows,
                cols,
                group,
                quants,
                scales,
            })) => Placed::Int8 {
                rows: *rows,
                cols: *cols,
                group: *group,
                quants: self.memory.upload(bytemuck::cast_slice(quants))?,
                scales: self.memory.upload(halves(scales))?,
            },
            Some(Weight::Vector(values)) => {
                Placed::Vector(self.memory.upload(bytemuck::cast_slice(values))?)
            }
            Some(Weight::F16(matrix)) => Placed::F16 {
                rows: matrix.rows,
                cols: matrix.cols,
                values: self.memory.upload(halves(&matrix.values))?,
            },
            Some(Weight::Ternary(_)) => {
                return Err(self.wrong_kind(id, "no ternary matrix"));
            }
            Some(Weight::Int4(_) | Weight::Int4Tiled(_)) => {
                return Err(self.wrong_kind(id, "an 8-bit matrix or a vector"));
            }
            None => return Err(Error::input(format!("there is no weight {id}"))),
        };
        self.weights[id] = Some(placed);
        Ok(placed)
    }

    pub(super) fn vector(&mut self, id: WeightId) -> Result<DeviceSlice, Error> {
        match self.weight(id)? {
            Placed::Vector(slice) => Ok(slice),
            _ => Err(self.wrong_kind(id, "a vector")),
        }
    }

    pub(super) fn wrong_kind(&self, id: WeightId, wanted: &str) -> Error {
        wrong_kind(self.model, id, wanted)
    }

    /// The biases of a product one after the other, zeros where a matrix has none; none if no
    /// matrix has one.
    fn biases(&mut self, product: &Product) -> Result<DeviceSlice, Error> {
        if let [Some(bias)] = product.biases[..] {
            return self.vector(bias);
        }
        if product.biases.iter().all(Option::is_none) {
            return Ok(DeviceSlice::NONE);
        }
        let mut all = Vec::new();
        for (matrix, bias) in product.matrices.iter().zip(&product.biases) {
            let rows = require_int4(self.model, *matrix)?.rows;
            match bias.map(|id| (id, self.model.weights.get(id))) {
                None => all.resize(all.len() + rows, 0f32),
                Some((_, Some(Weight::Vector(values)))) if values.len() == rows => {
                    all.extend_from_slice(values);
                }
                Some((id, _)) => return Err(self.wrong_kind(id, &format!("a vector of {rows}"))),
            }
        }
        self.memory.upload(bytemuck::cast_slice(&all))
    }

    /// The operands of a product, with its matrices `packed`, or only counted without.
    pub(super) fn place(
        &mut self,
        product: &Product,
        packed: Option<&Int4Tiled>,
    ) -> Result<PlacedProduct, Error> {
        Ok(PlacedProduct {
            tiles: self.tiles(product, packed)?,
            bias: self.biases(product)?,
            gain: match product.norm {
                Some(norm) => self.vector(norm.weight)?,
                None => DeviceSlice::NONE,
            },
            row_scales: match row_scales(self.model, product) {
                Some(scales) => self.memory.upload(bytemuck::cast_slice(&scales))?,
                None => DeviceSlice::NONE,
            },
        })
    }

    /// Room for the matrices of a product, filled with `packed`; without it only counted.
    fn tiles(
        &mut self,
        product: &Product,
        packed: Option<&Int4Tiled>,
    ) -> Result<PlacedTiles, Error> {
        let first = require_int4(self.model, product.matrices[0])?;
        let mut rows = first.rows;
        let mut matrix_rows = rows.div_ceil(TILE_ROWS / 2) * TILE_ROWS;
        if product.then != Then::SwiGlu {
            for id in &product.matrices[1..] {
                rows += require_int4(self.model, *id)?.rows;
            }
            matrix_rows = rows;
        }
        let tiles = matrix_rows.div_ceil(TILE_ROWS) * first.cols.div_ceil(TILE_COLS);
        let quants = bytes_of(&[tiles, TILE_ROWS * TILE_COLS / 2])?;
        let scales = bytes_of(&[tiles, TILE_ROWS * TILE_COLS / first.group, 2])?;
        let mut place = |bytes, part: Option<&[u8]>| match part {
            Some(part) => self.memory.upload(part),
            None => self.memory.reserve(bytes),
        };
        Ok(PlacedTiles {
            rows,
            cols: first.cols,
            group: first.group,
            quants: place(quants, packed.map(|p| bytemuck::cast_slice(&p.quants)))?,
            scales: place(scales, packed.map(|p| halves(&p.scales)))?,
            mins: match first.has_mins {
                true => place(scales, packed.and_then(|p| p.mins.as_deref()).map(halves))?,
                false => DeviceSlice::NONE,
            },
            zeros: first.zeros,
        })
    }
}
