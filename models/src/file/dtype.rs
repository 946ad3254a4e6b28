//! Element types of tensors: ids, names and block sizes of the GGML types, and what safetensors
//! files have beside them.

/// Declares [`DType`] with its id, name, elements a block and bytes a block in one table.
macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident = $id:literal, $elems:literal, $bytes:literal;)*) => {
        /// Element type of a tensor. Only some of them can be decoded into weights (see
        /// [`crate::weights::decode`]); all of them can be listed and measured.
        #[allow(non_camel_case_types)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum DType {
            $($(#[$doc])* $variant,)*
        }

        impl DType {
            /// Every type, by ascending id.
            pub const ALL: &[DType] = &[$(DType::$variant),*];

            /// The type with this GGML id.
            pub fn from_id(id: u32) -> Option<DType> {
                let found = match id {
                    $($id => DType::$variant,)*
                    _ => return None,
                };
                (id < FIRST_FOREIGN_ID).then_some(found)
            }

            /// GGML id; [`FIRST_FOREIGN_ID`] and more for a type that GGML does not have.
            pub fn id(self) -> u32 {
                match self { $(DType::$variant => $id,)* }
            }

            /// Name as GGML spells it.
            pub fn name(self) -> &'static str {
                match self { $(DType::$variant => stringify!($variant),)* }
            }

            /// Elements a block: rows are whole blocks.
            pub fn block_elems(self) -> u64 {
                match self { $(DType::$variant => $elems,)* }
            }

            /// Bytes a block.
            pub fn block_bytes(self) -> u64 {
                match self { $(DType::$variant => $bytes,)* }
            }
        }
    };
}

/// Ids from here on are not GGML's: no GGUF file holds them.
pub const FIRST_FOREIGN_ID: u32 = 1 << 31;

dtypes! {
    /// 32-bit float.
    F32 = 0, 1, 4;
    /// IEEE half.
    F16 = 1, 1, 2;
    /// 4 bits with a scale.
    Q4_0 = 2, 32, 18;
    /// 4 bits with a scale and a minimum.
    Q4_1 = 3, 32, 20;
    /// 5 bits with a scale.
    Q5_0 = 6, 32, 22;
    /// 5 bits with a scale and a minimum.
    Q5_1 = 7, 32, 24;
    /// 8 bits with a scale.
    Q8_0 = 8, 32, 34;
    /// 8 bits with a scale and a sum.
    Q8_1 = 9, 32, 36;
    /// 2 bits, two-level scales.
    Q2_K = 10, 256, 84;
    /// 3 bits, two-level scales.
    Q3_K = 11, 256, 110;
    /// 4 bits, two-level scales and minima.
    Q4_K = 12, 256, 144;
    /// 5 bits, two-level scales and minima.
    Q5_K = 13, 256, 176;
    /// 6 bits, two-level scales.
    Q6_K = 14, 256, 210;
    /// 8 bits with a 32-bit scale.
    Q8_K = 15, 256, 292;
    /// About 2 bits from a codebook.
    IQ2_XXS = 16, 256, 66;
    /// About 2 bits from a codebook.
    IQ2_XS = 17, 256, 74;
    /// About 3 bits from a codebook.
    IQ3_XXS = 18, 256, 98;
    /// About 1.5 bits from a codebook.
    IQ1_S = 19, 256, 50;
    /// 4 bits, non-linear levels.
    IQ4_NL = 20, 32, 18;
    /// About 3 bits from a codebook.
    IQ3_S = 21, 256, 110;
    /// About 2 bits from a codebook.
    IQ2_S = 22, 256, 82;
    /// 4 bits, non-linear levels, two-level scales.
    IQ4_XS = 23, 256, 136;
    /// 8-bit integer.
    I8 = 24, 1, 1;
    /// 16-bit integer.
    I16 = 25, 1, 2;
    /// 32-bit integer.
    I32 = 26, 1, 4;
    /// 64-bit integer.
    I64 = 27, 1, 8;
    /// 64-bit float.
    F64 = 28, 1, 8;
    /// About 1.75 bits from a codebook.
    IQ1_M = 29, 256, 56;
    /// Truncated 32-bit float.
    BF16 = 30, 1, 2;
    /// Ternary, five digits a byte.
    TQ1_0 = 34, 256, 54;
    /// Ternary, four digits a byte.
    TQ2_0 = 35, 256, 66;
    /// Ternary, four digits a byte, one scale behind the last row: bitnet.cpp's type.
    I2_S = 36, 128, 32;
    /// 4-bit floats with a shared exponent.
    MXFP4 = 39, 32, 17;
    /// 4-bit floats with 8-bit float scales.
    NVFP4 = 40, 64, 36;
    /// One bit with a scale.
    Q1_0 = 41, 128, 18;
    /// Unsigned 8-bit integer.
    U8 = 0x8000_0000, 1, 1;
    /// 8-bit float, 4 bits of exponent.
    F8_E4M3 = 0x8000_0001, 1, 1;
    /// 8-bit float, 5 bits of exponent.
    F8_E5M2 = 0x8000_0002, 1, 1;
    /// One byte, 0 or 1.
    BOOL = 0x8000_0003, 1, 1;
    /// Unsigned 16-bit integer.
    U16 = 0x8000_0004, 1, 2;
    /// Unsigned 32-bit integer.
    U32 = 0x8000_0005, 1, 4;
    /// Unsigned 64-bit integer.
    U64 = 0x8000_0006, 1, 8;
}

impl DType {
    /// Whether the elements are plain floats that weights can be made of.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }

    /// The type with this name in a safetensors header.
    pub fn from_safetensors(name: &str) -> Option<DType> {
        const NAMED: [DType; 15] = [
            DType::F64,
            DType::F32,
            DType::F16,
            DType::BF16,
            DType::F8_E4M3,
            DType::F8_E5M2,
            DType::I64,
            DType::I32,
            DType::I16,
            DType::I8,
            DType::U64,
            DType::U32,
            DType::U16,
            DType::U8,
            DType::BOOL,
        ];
        NAMED.iter().find(|t| t.name() == name).copied()
    }

    /// Bytes of a tensor with these dimensions (fastest first); `None` when a row is not a whole
    /// number of blocks or the size overflows.
    pub fn tensor_bytes(self, dims: &[u64]) -> Option<u64> {
        let row = *dims.first()?;
        if !row.is_multiple_of(self.block_elems()) {
            return None;
        }
        dims.iter()
            .skip(1)
            .try_fold(row / self.block_elems(), |blocks, d| blocks.checked_mul(*d))?
            .checked_mul(self.block_bytes())?
            .checked_add(self.trailer_bytes())
    }

    /// Bytes behind the blocks of a tensor.
    fn trailer_bytes(self) -> u64 {
        match self {
            // The scale, f32, and room up to a vector register of bytes.
            DType::I2_S => 32,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_unknown_ids_are_none() {
        for t in DType::ALL {
            let ggml = (t.id() < FIRST_FOREIGN_ID).then_some(*t);
            assert_eq!(DType::from_id(t.id()), ggml);
        }
        assert_eq!(DType::from_safetensors("BF16"), Some(DType::BF16));
        assert_eq!(DType::from_safetensors("Q4_0"), None);
        for id in [4, 5, 31, 1000, u32::MAX] {
            assert_eq!(DType::from_id(id), None);
        }
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(DType::Q4_1.tensor_bytes(&[64, 3]), Some(120));
        assert_eq!(DType::F32.tensor_bytes(&[5]), Some(20));
        assert_eq!(DType::Q4_0.tensor_bytes(&[33, 2]), None);
        assert_eq!(DType::I2_S.tensor_bytes(&[256, 3]), Some(3 * 64 + 32));
        assert_eq!(DType::F32.tensor_bytes(&[1 << 40, 1 << 40]), None);
        assert_eq!(DType::F32.tensor_bytes(&[1 << 62]), None);
        assert_eq!(DType::F32.tensor_bytes(&[]), None);
    }
}
